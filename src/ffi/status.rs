//! Numbers and texts of errors.

use super::boundary::{self, Failure};
use super::handle;
use crate::error::Error;
use std::ffi::{c_char, CStr, CString};

/// The result of a call. 0 is success; numbers are never given a second meaning. New ones may appear: treat an unknown one as an error.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum lycore_status {
    /// Done.
    LYCORE_OK = 0,
    /// A pointer that must not be NULL is.
    LYCORE_NULL_ARGUMENT = 1,
    /// A value that this call cannot take; the error's message says which.
    LYCORE_BAD_ARGUMENT = 2,
    /// The handle was freed, or is of another type.
    LYCORE_BAD_HANDLE = 3,
    /// Another thread is inside a call on this handle.
    LYCORE_BUSY = 4,
    /// A progress callback or a cancel flag stopped the call.
    LYCORE_CANCELLED = 5,
    /// This build or version cannot do it.
    LYCORE_UNSUPPORTED = 6,
    /// libtorch or the operating system failed underneath.
    LYCORE_BACKEND = 7,
    /// A defect of the library; nothing was left half done that the call's description does not name. Please report it.
    LYCORE_PANIC = 8,
    /// A file cannot be read or written, or lies about its content.
    LYCORE_FILE = 100,
    /// A key of a file or the name of a weight does not fit.
    LYCORE_KEY = 200,
    /// Shapes that must agree do not.
    LYCORE_SHAPE = 300,
    /// A dtype that the call does not take.
    LYCORE_DTYPE = 301,
    /// A device that is not there or that this build cannot use.
    LYCORE_DEVICE = 400,
    /// Training cannot go on.
    LYCORE_TRAIN = 500,
}

use lycore_status::*;

/// Every status with its text.
const TEXTS: &[(lycore_status, &CStr)] = &[
    (LYCORE_OK, c"ok"),
    (LYCORE_NULL_ARGUMENT, c"null argument"),
    (LYCORE_BAD_ARGUMENT, c"bad argument"),
    (LYCORE_BAD_HANDLE, c"bad handle"),
    (LYCORE_BUSY, c"busy"),
    (LYCORE_CANCELLED, c"cancelled"),
    (LYCORE_UNSUPPORTED, c"unsupported"),
    (LYCORE_BACKEND, c"backend error"),
    (LYCORE_PANIC, c"internal error"),
    (LYCORE_FILE, c"file error"),
    (LYCORE_KEY, c"key error"),
    (LYCORE_SHAPE, c"shape error"),
    (LYCORE_DTYPE, c"dtype error"),
    (LYCORE_DEVICE, c"device error"),
    (LYCORE_TRAIN, c"training error"),
];

impl From<&Error> for lycore_status {
    fn from(error: &Error) -> Self {
        match error {
            Error::Argument { .. } => LYCORE_BAD_ARGUMENT,
            Error::File { .. } => LYCORE_FILE,
            Error::Key { .. } => LYCORE_KEY,
            Error::Shape { .. } => LYCORE_SHAPE,
            Error::Dtype { .. } => LYCORE_DTYPE,
            Error::Device { .. } => LYCORE_DEVICE,
            Error::Train { .. } => LYCORE_TRAIN,
            Error::Unsupported { .. } => LYCORE_UNSUPPORTED,
            Error::Cancelled => LYCORE_CANCELLED,
            Error::Backend(_) => LYCORE_BACKEND,
        }
    }
}

/// What a failed call says. Freed by the caller with lycore_error_free.
pub struct lycore_error {
    _opaque: [u8; 0],
}

/// The texts of one error, as C strings.
pub(super) struct ErrorTexts {
    status: lycore_status,
    message: CString,
    hint: CString,
    key: CString,
    file: CString,
}

impl From<&Failure> for ErrorTexts {
    fn from(failure: &Failure) -> Self {
        let text = boundary::c_text;
        let (hint, key, file) = match failure {
            Failure::Error(e) => (
                text(e.hint()),
                text(e.key().unwrap_or("")),
                text(&e.file().map(|f| f.display().to_string()).unwrap_or_default()),
            ),
            Failure::Boundary { .. } => Default::default(),
        };
        ErrorTexts { status: failure.status(), message: text(&failure.message()), hint, key, file }
    }
}

fn field(error: *const lycore_error, pick: fn(&ErrorTexts) -> &CStr) -> *const c_char {
    boundary::value(c"".as_ptr(), || {
        let texts = handle::get::<ErrorTexts>(error.cast(), "error")?;
        Ok(pick(&texts).as_ptr())
    })
}

/// The short name of a status, for logs; "unknown status" for a number that this version does not know. Static, never NULL.
#[no_mangle]
pub extern "C" fn lycore_status_text(status: i32) -> *const c_char {
    TEXTS.iter().find(|(s, _)| *s as i32 == status).map_or(c"unknown status", |(_, text)| text).as_ptr()
}

/// The status that the call returned beside this error; LYCORE_BAD_HANDLE when `error` is not a live error.
#[no_mangle]
pub extern "C" fn lycore_error_status(error: *const lycore_error) -> lycore_status {
    boundary::value(LYCORE_BAD_HANDLE, || Ok(handle::get::<ErrorTexts>(error.cast(), "error")?.status))
}

/// What went wrong: one sentence with file, tensor and numbers. UTF-8, valid until the error is freed; never NULL.
#[no_mangle]
pub extern "C" fn lycore_error_message(error: *const lycore_error) -> *const c_char {
    field(error, |e| &e.message)
}

/// What to do about it; "" when the message says it all. UTF-8, valid until the error is freed; never NULL.
#[no_mangle]
pub extern "C" fn lycore_error_hint(error: *const lycore_error) -> *const c_char {
    field(error, |e| &e.hint)
}

/// The tensor, module or key concerned; "" when there is none. UTF-8, valid until the error is freed; never NULL.
#[no_mangle]
pub extern "C" fn lycore_error_key(error: *const lycore_error) -> *const c_char {
    field(error, |e| &e.key)
}

/// The file concerned; "" when there is none. UTF-8, valid until the error is freed; never NULL.
#[no_mangle]
pub extern "C" fn lycore_error_file(error: *const lycore_error) -> *const c_char {
    field(error, |e| &e.file)
}

/// Frees an error. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing.
#[no_mangle]
pub extern "C" fn lycore_error_free(error: *mut lycore_error) -> lycore_status {
    handle::free::<ErrorTexts>(error.cast())
}

/// Frees a text that a call returned through a `char **`. NULL is accepted; a pointer that is not such a text, or no longer one, returns
/// LYCORE_BAD_HANDLE and does nothing.
#[no_mangle]
pub extern "C" fn lycore_text_free(text: *mut c_char) -> lycore_status {
    boundary::value(LYCORE_PANIC, || Ok(handle::free_text(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts_are_one_to_one() {
        let mut seen = std::collections::HashSet::new();
        for (status, text) in TEXTS {
            assert!(seen.insert(*text), "{text:?} twice");
            // SAFETY: a static C string.
            let found = unsafe { CStr::from_ptr(lycore_status_text(*status as i32)) };
            assert_eq!(found, *text);
        }
        // SAFETY: a static C string.
        assert_eq!(unsafe { CStr::from_ptr(lycore_status_text(-7)) }, c"unknown status");
    }
}
