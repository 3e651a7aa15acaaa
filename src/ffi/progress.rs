//! How far, and stop: what every long call takes.

use super::boundary::{self, Outcome};
use super::handle;
use super::status::{lycore_error, lycore_status};
use crate::progress::{Cancel, Progress};
use std::ffi::c_void;

/// A flag that stops the calls that watch it. Any thread may raise it. Freed with lycore_cancel_free.
pub struct lycore_cancel {
    _opaque: [u8; 0],
}

/// Called on the thread of the long call, after each of its steps, with how much is done of how much; the unit is named by the call. Return
/// true to go on, false to stop. Must not call into the object that is at work.
pub type lycore_progress_callback =
    Option<unsafe extern "C" fn(user_data: *mut c_void, done: u64, total: u64) -> bool>;

/// What a long call reports to and is stopped by. Zero every field that is not used.
#[repr(C)]
pub struct lycore_progress {
    /// sizeof(lycore_progress).
    pub struct_size: u64,
    /// May be NULL.
    pub callback: lycore_progress_callback,
    /// Passed to the callback.
    pub user_data: *mut c_void,
    /// May be NULL.
    pub cancel: *const lycore_cancel,
}

/// Runs `work` with the caller's progress; NULL means that nobody watches.
///
/// # Safety
/// `progress` is NULL or points to a struct as described, whose callback may be called during the call.
pub(super) unsafe fn with<T>(
    progress: *const lycore_progress,
    work: impl FnOnce(&mut Progress<'_>) -> Outcome<T>,
) -> Outcome<T> {
    if progress.is_null() {
        return work(&mut Progress::none());
    }
    // SAFETY: the caller's promise.
    let given = unsafe { boundary::sized(progress, "progress")? };
    let cancel = match given.cancel.is_null() {
        true => None,
        false => Some((*handle::get::<Cancel>(given.cancel.cast(), "progress.cancel")?).clone()),
    };
    let (callback, user_data) = (given.callback, given.user_data);
    let mut report = |done, total| match callback {
        // SAFETY: the caller's promise: its function, with its data, on its thread.
        Some(call) => unsafe { call(user_data, done, total) },
        None => true,
    };
    work(&mut Progress { report: Some(&mut report), cancel })
}

/// A new flag, not raised.
///
/// # Safety
/// `out` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_cancel_new(
    out: *mut *mut lycore_cancel,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises, here and in every function below.
    unsafe {
        boundary::run(error, || {
            *boundary::out(out, "out")? = handle::new(Cancel::default()).cast();
            Ok(())
        })
    }
}

/// Raises the flag: calls that watch it stop at their next step and return LYCORE_CANCELLED. From any thread, at any time.
#[no_mangle]
pub extern "C" fn lycore_cancel_request(cancel: *const lycore_cancel) -> lycore_status {
    on_flag(cancel, Cancel::request)
}

/// Lowers the flag, so that it can serve another call.
#[no_mangle]
pub extern "C" fn lycore_cancel_reset(cancel: *const lycore_cancel) -> lycore_status {
    on_flag(cancel, Cancel::reset)
}

fn on_flag(cancel: *const lycore_cancel, act: fn(&Cancel)) -> lycore_status {
    // SAFETY: a NULL error pointer is allowed.
    unsafe {
        boundary::run(std::ptr::null_mut(), || {
            act(&*handle::get::<Cancel>(cancel.cast(), "cancel")?);
            Ok(())
        })
    }
}

/// Frees a flag. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing. Calls that watch it go on.
#[no_mangle]
pub extern "C" fn lycore_cancel_free(cancel: *mut lycore_cancel) -> lycore_status {
    handle::free::<Cancel>(cancel.cast())
}
