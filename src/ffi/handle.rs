//! What hosts hold. A handle is a number in a pointer's clothes, never an address: it is looked up in a table, checked for its type, and
//! never given out twice. So a freed handle, a handle of another type and plain nonsense are errors instead of undefined behaviour, and an
//! object that one thread frees while another uses it lives until that call returns.

use super::boundary::{Failure, Outcome};
use super::status::lycore_status::{self, LYCORE_BAD_HANDLE, LYCORE_NULL_ARGUMENT, LYCORE_OK};
use once_cell::sync::Lazy;
use parking_lot::{Mutex, MutexGuard, RwLock};
use std::any::Any;
use std::collections::HashMap;
use std::ffi::{c_char, c_void, CString};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

type Object = Arc<dyn Any + Send + Sync>;

static OBJECTS: Lazy<RwLock<HashMap<usize, Object>>> = Lazy::new(Default::default);
static TEXTS: Lazy<Mutex<HashMap<usize, CString>>> = Lazy::new(Default::default);
/// Odd numbers: no allocator returns them, so a handle is never mistaken for an address or the reverse.
static NEXT: AtomicUsize = AtomicUsize::new(0x1001);

/// Gives an object to the host.
pub(super) fn new<T: Any + Send + Sync>(object: T) -> *mut c_void {
    let id = NEXT.fetch_add(2, Ordering::Relaxed);
    OBJECTS.write().insert(id, Arc::new(object));
    id as *mut c_void
}

/// The object behind a handle.
pub(super) fn get<T: Any + Send + Sync>(handle: *const c_void, name: &'static str) -> Outcome<Arc<T>> {
    if handle.is_null() {
        return Err(Failure::boundary(LYCORE_NULL_ARGUMENT, format!("`{name}` is NULL")));
    }
    let object = OBJECTS.read().get(&(handle as usize)).cloned();
    let Some(object) = object else {
        return Err(Failure::boundary(
            LYCORE_BAD_HANDLE,
            format!("`{name}` was freed, or was never a handle"),
        ));
    };
    object
        .downcast()
        .map_err(|_| Failure::boundary(LYCORE_BAD_HANDLE, format!("`{name}` is a handle of another type")))
}

/// Takes an object from the host; the last call that still uses it frees the memory.
pub(super) fn free<T: Any + Send + Sync>(handle: *mut c_void) -> lycore_status {
    super::boundary::value(lycore_status::LYCORE_PANIC, || {
        if handle.is_null() {
            return Ok(LYCORE_OK);
        }
        let mut objects = OBJECTS.write();
        let id = handle as usize;
        if !objects.get(&id).is_some_and(|object| object.is::<T>()) {
            return Ok(LYCORE_BAD_HANDLE);
        }
        let object = objects.remove(&id);
        // Dropping may take a while (and may unmap files): not under the lock.
        drop(objects);
        drop(object);
        Ok(LYCORE_OK)
    })
}

/// Locks an object that one call at a time may use.
pub(super) fn lock<'a, T>(object: &'a Mutex<T>, name: &'static str) -> Outcome<MutexGuard<'a, T>> {
    object.try_lock().ok_or_else(|| {
        Failure::boundary(lycore_status::LYCORE_BUSY, format!("another call on `{name}` is running"))
    })
}

/// Gives a text to the host.
pub(super) fn new_text(text: CString) -> *mut c_char {
    let address = text.as_ptr().cast_mut();
    TEXTS.lock().insert(address as usize, text);
    address
}

/// Takes a text from the host.
pub(super) fn free_text(text: *mut c_char) -> lycore_status {
    if text.is_null() || TEXTS.lock().remove(&(text as usize)).is_some() {
        LYCORE_OK
    } else {
        LYCORE_BAD_HANDLE
    }
}
