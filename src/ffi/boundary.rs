//! The door of every export: no panic leaves, NULL is checked, a failure becomes a status and an error object.

use super::handle;
use super::status::lycore_status::{
    self, LYCORE_BAD_ARGUMENT, LYCORE_NULL_ARGUMENT, LYCORE_OK, LYCORE_PANIC,
};
use super::status::{lycore_error, ErrorTexts};
use crate::error::Error;
use std::ffi::{c_char, CStr, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// Why a call failed: in the library, or already at the door.
pub(super) enum Failure {
    Error(Error),
    Boundary { status: lycore_status, message: String },
}

/// What the body of an export returns.
pub(super) type Outcome<T> = Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

impl Failure {
    pub(super) fn boundary(status: lycore_status, message: String) -> Self {
        Failure::Boundary { status, message }
    }

    pub(super) fn status(&self) -> lycore_status {
        match self {
            Failure::Error(e) => e.into(),
            Failure::Boundary { status, .. } => *status,
        }
    }

    pub(super) fn message(&self) -> String {
        match self {
            Failure::Error(e) => e.to_string(),
            Failure::Boundary { message, .. } => message.clone(),
        }
    }
}

/// Runs the body of an export. On failure, and if the caller wants it, `*error` becomes a new error object; on success it becomes NULL.
///
/// # Safety
/// `error` is NULL or may be written.
pub(super) unsafe fn run(error: *mut *mut lycore_error, body: impl FnOnce() -> Outcome<()>) -> lycore_status {
    if !error.is_null() {
        // SAFETY: the caller's promise.
        unsafe { *error = std::ptr::null_mut() };
    }
    // A panic can leave a locked object behind only inside its mutex, which parking_lot opens again; its calls then work on whatever
    // state was reached, which every operation here can take.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return LYCORE_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => panicked(&*panic),
    };
    if !error.is_null() {
        let made = catch_unwind(AssertUnwindSafe(|| handle::new(ErrorTexts::from(&failure))));
        // SAFETY: the caller's promise.
        unsafe { *error = made.unwrap_or(std::ptr::null_mut()).cast() };
    }
    failure.status()
}

/// A caught panic as a failure.
pub(super) fn panicked(panic: &(dyn std::any::Any + Send)) -> Failure {
    Failure::boundary(LYCORE_PANIC, format!("internal error: {}", panic_text(panic)))
}

/// Runs the body of an export that returns a plain value; `otherwise` stands for every failure.
pub(super) fn value<T>(otherwise: T, body: impl FnOnce() -> Outcome<T>) -> T {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        _ => otherwise,
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unknown panic".into())
}

/// A C string of a text; interior NULs, which no message needs, are dropped.
pub(super) fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

/// A text from the caller.
///
/// # Safety
/// `text` is NULL or a NUL-terminated string that stays unchanged for the call.
pub(super) unsafe fn text<'a>(text: *const c_char, name: &'static str) -> Outcome<&'a str> {
    if text.is_null() {
        return Err(Failure::boundary(LYCORE_NULL_ARGUMENT, format!("`{name}` is NULL")));
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }
        .to_str()
        .map_err(|_| Failure::boundary(LYCORE_BAD_ARGUMENT, format!("`{name}` is not UTF-8")))
}

/// A text from the caller that may be missing.
///
/// # Safety
/// As [`text`].
pub(super) unsafe fn optional_text<'a>(given: *const c_char, name: &'static str) -> Outcome<Option<&'a str>> {
    if given.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { text(given, name) }.map(Some)
}

/// A place for a result, checked before the work so that nothing is done in vain.
///
/// # Safety
/// `out` is NULL or may be written.
pub(super) unsafe fn out<'a, T>(out: *mut T, name: &'static str) -> Outcome<&'a mut T> {
    // SAFETY: the caller's promise; every T here is plain data.
    unsafe { out.as_mut() }
        .ok_or_else(|| Failure::boundary(LYCORE_NULL_ARGUMENT, format!("`{name}` is NULL")))
}

/// A struct from the caller that begins with its own size.
///
/// # Safety
/// `given` is NULL or points to a struct whose first field is its size as the caller compiled it.
pub(super) unsafe fn sized<'a, T>(given: *const T, name: &'static str) -> Outcome<&'a T> {
    if given.is_null() {
        return Err(Failure::boundary(LYCORE_NULL_ARGUMENT, format!("`{name}` is NULL")));
    }
    // SAFETY: the first field of every such struct is a u64.
    let size = unsafe { given.cast::<u64>().read() };
    let known = std::mem::size_of::<T>() as u64;
    if size != known {
        let message = format!(
            "`{name}`: struct_size is {size}, this version's struct has {known} bytes; set it to sizeof"
        );
        return Err(Failure::boundary(LYCORE_BAD_ARGUMENT, message));
    }
    // SAFETY: the caller's promise, and the size says that it is this struct.
    Ok(unsafe { &*given })
}

/// An array from the caller; the pointer is not looked at when the count is 0.
///
/// # Safety
/// `data` is NULL or points to `count` values that stay unchanged for the call.
pub(super) unsafe fn array<'a, T>(data: *const T, count: u64, name: &'static str) -> Outcome<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(Failure::boundary(
            LYCORE_NULL_ARGUMENT,
            format!("`{name}` is NULL but its count is {count}"),
        ));
    }
    let size = usize::try_from(count).ok().and_then(|n| n.checked_mul(std::mem::size_of::<T>()));
    if size.is_none_or(|size| size > isize::MAX as usize) {
        return Err(Failure::boundary(
            LYCORE_BAD_ARGUMENT,
            format!("`{name}`: a count of {count} is impossible"),
        ));
    }
    // SAFETY: the caller's promise; the size fits.
    Ok(unsafe { std::slice::from_raw_parts(data, count as usize) })
}
