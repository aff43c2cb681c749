//! Ranks that have found one another, and what they do together.

use std::ffi::{CString, c_int};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

use super::store::{c_string, milliseconds};
use super::work::{Sum, Work};
use super::{CollectiveError, Store, ffi};

/// A set of ranks, numbered from 0, that reduce tensors together.
#[derive(Debug)]
pub struct ProcessGroup {
    handle: NonNull<ffi::GroupHandle>,
    member: Member,
}

// SAFETY: c10d's backends are bound to no thread; they are called by one at a time, as `&mut`-free
// methods of a type that is not `Sync`.
unsafe impl Send for ProcessGroup {}

/// How the end of an operation is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ends {
    /// The backend's own thread tells.
    Told,
    /// It is asked again and again: as over NCCL, and over Gloo in tests.
    #[cfg_attr(not(test), allow(dead_code))]
    Asked,
}

/// Who is speaking, for errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    pub(super) rank: u32,
    pub(super) world_size: u32,
}

impl Member {
    pub(super) fn failed(self, operation: &'static str, text: Option<String>) -> CollectiveError {
        let Self { rank, world_size } = self;
        let text = text.unwrap_or_else(ffi::unexplained);
        CollectiveError::Operation { operation, rank, world_size, text }
    }
}

impl ProcessGroup {
    /// Forms a group for tensors in the memory of `device`: over Gloo for a CPU,
    /// over NCCL for a GPU. Waits until all of `world_size` ranks are connected
    /// with one another.
    ///
    /// `number` keeps this group's keys in the store apart from those of
    /// groups before it; all ranks give the same one. `timeout` bounds the
    /// forming and each operation. `host` is an address of this machine, at
    /// which the other ranks reach it over Gloo; NCCL chooses by itself, or as
    /// `NCCL_SOCKET_IFNAME` says.
    ///
    /// # Errors
    /// [`CollectiveError::Operation`] where a peer stays away for `timeout`, or
    /// where `host` is not an address of this machine;
    /// [`CollectiveError::NoCuda`] for a GPU where this build has no NCCL.
    pub fn form(
        store: &Store,
        number: u64,
        rank: u32,
        world_size: u32,
        timeout: Duration,
        host: &str,
        device: Device,
    ) -> Result<Self, CollectiveError> {
        match device {
            Device::Cpu => Self::gloo(store, number, rank, world_size, timeout, host),
            Device::Cuda(index) => {
                Self::nccl(store, number, Member { rank, world_size }, timeout, index)
            }
            other => Err(CollectiveError::NoCuda(other)),
        }
    }

    /// [`Self::form`] over Gloo.
    ///
    /// # Errors
    /// As [`Self::form`].
    pub fn gloo(
        store: &Store,
        number: u64,
        rank: u32,
        world_size: u32,
        timeout: Duration,
        host: &str,
    ) -> Result<Self, CollectiveError> {
        Self::gloo_ending(Ends::Told, store, number, Member { rank, world_size }, timeout, host)
    }

    pub(super) fn gloo_ending(
        ends: Ends,
        store: &Store,
        number: u64,
        member: Member,
        timeout: Duration,
        host: &str,
    ) -> Result<Self, CollectiveError> {
        let (rank, world_size) = c_ranks(member.rank, member.world_size)?;
        let prefix = prefix(number);
        let host = c_string(host)?;
        let (handle, text) = ffi::call(|error| {
            // SAFETY: the store's handle is live, the strings outlive the call, `error` is valid.
            unsafe {
                ffi::drift_group_gloo(
                    store.handle(),
                    prefix.as_ptr(),
                    rank,
                    world_size,
                    milliseconds(timeout),
                    host.as_ptr(),
                    ends == Ends::Asked,
                    error,
                )
            }
        });
        Self::from_handle(handle, member, text)
    }

    #[cfg(feature = "cuda")]
    fn nccl(
        store: &Store,
        number: u64,
        member: Member,
        timeout: Duration,
        index: usize,
    ) -> Result<Self, CollectiveError> {
        let (rank, world_size) = c_ranks(member.rank, member.world_size)?;
        let prefix = prefix(number);
        let (handle, text) = ffi::call(|error| {
            // SAFETY: the store's handle is live, the string outlives the call, `error` is valid.
            unsafe {
                ffi::drift_group_nccl(
                    store.handle(),
                    prefix.as_ptr(),
                    rank,
                    world_size,
                    milliseconds(timeout),
                    index as c_int,
                    error,
                )
            }
        });
        Self::from_handle(handle, member, text)
    }

    #[cfg(not(feature = "cuda"))]
    fn nccl(
        _: &Store,
        _: u64,
        _: Member,
        _: Duration,
        index: usize,
    ) -> Result<Self, CollectiveError> {
        Err(CollectiveError::NoCuda(Device::Cuda(index)))
    }

    fn from_handle(
        handle: *mut ffi::GroupHandle,
        member: Member,
        text: Option<String>,
    ) -> Result<Self, CollectiveError> {
        match NonNull::new(handle) {
            Some(handle) => Ok(Self { handle, member }),
            None => Err(member.failed("form group", text)),
        }
    }

    /// This process's number in the group.
    pub fn rank(&self) -> u32 {
        self.member.rank
    }

    /// How many ranks the group has.
    pub fn world_size(&self) -> u32 {
        self.member.world_size
    }

    /// Starts summing `tensor` over all ranks, in place. Until
    /// [`Work::wait`] returns, its elements are neither to be read nor written.
    ///
    /// Every rank ends with the same bytes.
    ///
    /// # Errors
    /// [`CollectiveError::NotContiguous`]; [`CollectiveError::Operation`] for a
    /// kind of element that the backend cannot sum.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<Work, CollectiveError> {
        self.start("all_reduce", &[tensor], |error| {
            // SAFETY: group and tensor are live; the bridge takes its own reference to the tensor.
            unsafe {
                ffi::drift_all_reduce(self.handle.as_ptr(), ffi::tensor_handle(tensor), error)
            }
        })
    }

    /// Starts summing `flat` (`[ranks · share]`) over all ranks, so that
    /// [`Work::wait`] leaves in `share` (`[share]`) this rank's part of the sum,
    /// the one at its rank's place. Until then no tensor given is to be touched;
    /// `flat` keeps its values, and `received`, of its kind and length, is
    /// overwritten with what the others sent.
    ///
    /// The ranks' values are added in the order of ranks and in the kind of
    /// `share`, so bf16 goes over the wire and is summed in fp32.
    ///
    /// Over Gloo this is an all-to-all and a sum by the thread that waits.
    /// c10d's own `_reduce_scatter_base` over Gloo is an all-reduce of a copy:
    /// twice the bytes, and no way to learn when it ended.
    ///
    /// # Errors
    /// As [`Self::all_reduce`], and [`CollectiveError::Share`].
    pub fn reduce_scatter(
        &self,
        flat: &Tensor,
        received: &Tensor,
        share: &Tensor,
    ) -> Result<Work, CollectiveError> {
        const NAME: &str = "reduce_scatter";
        self.check_share(NAME, flat, share)?;
        self.check_share(NAME, received, share)?;
        let rows = received.f_view([i64::from(self.member.world_size), -1]);
        let rows = rows.map_err(|error| self.member.failed(NAME, Some(error.to_string())))?;
        let work = self.start(NAME, &[flat, received, share], |error| {
            // SAFETY: group and tensors are live; the bridge takes its own references to the tensors.
            unsafe {
                ffi::drift_all_to_all(
                    self.handle.as_ptr(),
                    ffi::tensor_handle(received),
                    ffi::tensor_handle(flat),
                    error,
                )
            }
        })?;
        Ok(work.then(Sum { rows, into: share.shallow_clone() }))
    }

    /// Starts gathering every rank's `share` (`[share]`) into `whole`
    /// (`[ranks · share]`), in the order of ranks. Until [`Work::wait`] returns,
    /// neither is to be touched.
    ///
    /// # Errors
    /// As [`Self::all_reduce`], and [`CollectiveError::Share`].
    pub fn all_gather(&self, whole: &Tensor, share: &Tensor) -> Result<Work, CollectiveError> {
        const NAME: &str = "all_gather";
        self.check_share(NAME, whole, share)?;
        self.start(NAME, &[whole, share], |error| {
            // SAFETY: group and tensors are live; the bridge takes its own references to the tensors.
            unsafe {
                ffi::drift_all_gather(
                    self.handle.as_ptr(),
                    ffi::tensor_handle(whole),
                    ffi::tensor_handle(share),
                    error,
                )
            }
        })
    }

    /// Overwrites `tensor` on every rank with what it holds on rank `root`.
    ///
    /// # Errors
    /// As [`Self::all_reduce`], and [`CollectiveError::Rank`].
    pub fn broadcast(&self, tensor: &Tensor, root: u32) -> Result<(), CollectiveError> {
        let (c_root, _) = c_ranks(root, self.member.world_size)?;
        let work = self.start("broadcast", &[tensor], |error| {
            // SAFETY: group and tensor are live; the bridge takes its own reference to the tensor.
            unsafe {
                ffi::drift_broadcast(
                    self.handle.as_ptr(),
                    ffi::tensor_handle(tensor),
                    c_root,
                    error,
                )
            }
        })?;
        work.wait()
    }

    /// Returns when every rank has come here, with everything before it done.
    ///
    /// # Errors
    /// [`CollectiveError::Operation`] where a peer stays away or is gone.
    pub fn barrier(&self) -> Result<(), CollectiveError> {
        let work = self.start("barrier", &[], |error| {
            // SAFETY: the group is live and `error` is valid.
            unsafe { ffi::drift_barrier(self.handle.as_ptr(), error) }
        })?;
        work.wait()
    }

    fn start(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        body: impl FnOnce(*mut *mut std::ffi::c_char) -> *mut ffi::WorkHandle,
    ) -> Result<Work, CollectiveError> {
        if let Some(tensor) = tensors.iter().find(|tensor| !tensor.is_contiguous()) {
            return Err(CollectiveError::NotContiguous { operation, shape: tensor.size() });
        }
        let started = Instant::now();
        let (handle, text) = ffi::call(body);
        let handle = NonNull::new(handle).ok_or_else(|| self.member.failed(operation, text))?;
        Ok(Work::new(handle, operation, self.member, started, tensors))
    }

    fn check_share(
        &self,
        operation: &'static str,
        flat: &Tensor,
        share: &Tensor,
    ) -> Result<(), CollectiveError> {
        let Member { world_size, .. } = self.member;
        let (flat, share) = (flat.numel(), share.numel());
        if flat == share * world_size as usize {
            Ok(())
        } else {
            Err(CollectiveError::Share { operation, flat, share, world_size })
        }
    }
}

/// Sets what c10d's NCCL backend reads from the environment, where the user has
/// not: faults are ours to handle, and the flight recorder is on.
///
/// To be called at the start of the program, while it has one thread.
#[cfg(feature = "cuda")]
pub fn nccl_defaults() {
    // SAFETY: sets variables of the environment, which no other thread reads meanwhile, as said.
    unsafe { ffi::drift_nccl_defaults() }
}

/// Makes GPU `index` the calling thread's own, before anything is allocated.
///
/// # Errors
/// [`CollectiveError::Device`] where it does not answer.
#[cfg(feature = "cuda")]
pub fn use_gpu(index: usize) -> Result<(), CollectiveError> {
    // SAFETY: `error` is valid.
    let (done, text) = ffi::call(|error| unsafe { ffi::drift_cuda_use(index as c_int, error) });
    let text = text.unwrap_or_else(ffi::unexplained);
    if done { Ok(()) } else { Err(CollectiveError::Device { index, text }) }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: the handle came from the bridge and is freed once, here; works under way, which
        // this gives up, hold references of their own.
        unsafe { ffi::drift_group_free(self.handle.as_ptr()) }
    }
}

fn c_ranks(rank: u32, world_size: u32) -> Result<(c_int, c_int), CollectiveError> {
    let outside = CollectiveError::Rank { rank, world_size };
    match (c_int::try_from(rank), c_int::try_from(world_size)) {
        (Ok(c_rank), Ok(c_size)) if c_rank < c_size => Ok((c_rank, c_size)),
        _ => Err(outside),
    }
}

fn prefix(number: u64) -> CString {
    // A formatted number holds no zero byte.
    CString::new(format!("group/{number}")).unwrap_or_default()
}
