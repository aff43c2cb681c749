//! The bridge's functions as C declares them, and how their errors come back.

use std::ffi::{CStr, c_char, c_int};

use tch::Tensor;

/// A `c10d::Store`.
#[repr(C)]
pub(super) struct StoreHandle {
    _opaque: [u8; 0],
}

/// A `c10d::Backend`.
#[repr(C)]
pub(super) struct GroupHandle {
    _opaque: [u8; 0],
}

/// A `c10d::Work`, and a watch on its end.
#[repr(C)]
pub(super) struct WorkHandle {
    _opaque: [u8; 0],
}

/// An `at::Tensor`.
#[repr(C)]
pub(super) struct TensorHandle {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn drift_free_text(text: *mut c_char);

    pub(super) fn drift_store_listen(
        host: *const c_char,
        port: u16,
        socket: c_int,
        error: *mut *mut c_char,
    ) -> *mut StoreHandle;
    pub(super) fn drift_store_connect(
        host: *const c_char,
        port: u16,
        timeout_ms: i64,
        error: *mut *mut c_char,
    ) -> *mut StoreHandle;
    pub(super) fn drift_store_free(store: *mut StoreHandle);

    pub(super) fn drift_group_gloo(
        store: *const StoreHandle,
        prefix: *const c_char,
        rank: c_int,
        world_size: c_int,
        timeout_ms: i64,
        host: *const c_char,
        asked: bool,
        error: *mut *mut c_char,
    ) -> *mut GroupHandle;
    pub(super) fn drift_group_free(group: *mut GroupHandle);

    pub(super) fn drift_all_reduce(
        group: *const GroupHandle,
        tensor: *const TensorHandle,
        error: *mut *mut c_char,
    ) -> *mut WorkHandle;
    pub(super) fn drift_broadcast(
        group: *const GroupHandle,
        tensor: *const TensorHandle,
        root: c_int,
        error: *mut *mut c_char,
    ) -> *mut WorkHandle;
    pub(super) fn drift_all_to_all(
        group: *const GroupHandle,
        received: *const TensorHandle,
        sent: *const TensorHandle,
        error: *mut *mut c_char,
    ) -> *mut WorkHandle;
    pub(super) fn drift_all_gather(
        group: *const GroupHandle,
        whole: *const TensorHandle,
        share: *const TensorHandle,
        error: *mut *mut c_char,
    ) -> *mut WorkHandle;
    pub(super) fn drift_barrier(
        group: *const GroupHandle,
        error: *mut *mut c_char,
    ) -> *mut WorkHandle;

    pub(super) fn drift_work_ended_within(work: *const WorkHandle, microseconds: i64) -> bool;
    pub(super) fn drift_work_nanoseconds_since_end(work: *const WorkHandle) -> i64;
    pub(super) fn drift_work_wait(work: *const WorkHandle, error: *mut *mut c_char) -> bool;
    pub(super) fn drift_work_free(work: *mut WorkHandle);
}

#[cfg(feature = "cuda")]
unsafe extern "C" {
    pub(super) fn drift_nccl_defaults();
    pub(super) fn drift_cuda_use(device: c_int, error: *mut *mut c_char) -> bool;
    pub(super) fn drift_group_nccl(
        store: *const StoreHandle,
        prefix: *const c_char,
        rank: c_int,
        world_size: c_int,
        timeout_ms: i64,
        device: c_int,
        error: *mut *mut c_char,
    ) -> *mut GroupHandle;
}

/// The `at::Tensor` inside a [`Tensor`].
pub(super) fn tensor_handle(tensor: &Tensor) -> *const TensorHandle {
    tensor.as_ptr().cast()
}

/// Calls the bridge with a place for an error's text, and gives back what the
/// call returned along with that text, if it left any.
pub(super) fn call<R>(body: impl FnOnce(*mut *mut c_char) -> R) -> (R, Option<String>) {
    let mut text: *mut c_char = std::ptr::null_mut();
    let result = body(&raw mut text);
    if text.is_null() {
        return (result, None);
    }
    // SAFETY: the bridge left a NUL-terminated string from `strdup` and keeps no copy of the pointer.
    let words = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: `text` came from `strdup` and is freed once, here.
    unsafe { drift_free_text(text) };
    (result, Some(words))
}

/// What stands in for a text that the bridge failed to leave.
pub(super) fn unexplained() -> String {
    "c10d gave no reason".to_owned()
}
