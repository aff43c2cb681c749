#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::group::{Ends, Member};
use super::{CollectiveError, ProcessGroup, Store};

const HOST: &str = "127.0.0.1";
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `body` on each of the group's ranks, each on a thread of its own.
fn on_ranks<const N: usize, R: Send + 'static>(
    generation: u64,
    body: impl Fn(ProcessGroup) -> R + Clone + Send + 'static,
) -> [R; N] {
    on_ranks_ending(Ends::Told, generation, body)
}

fn on_ranks_ending<const N: usize, R: Send + 'static>(
    ends: Ends,
    generation: u64,
    body: impl Fn(ProcessGroup) -> R + Clone + Send + 'static,
) -> [R; N] {
    let (store, port) = Store::listen(HOST).unwrap();
    let form = move |store: &Store, rank: usize| {
        let member = Member { rank: rank as u32, world_size: N as u32 };
        ProcessGroup::gloo_ending(ends, store, generation, member, PATIENCE, HOST).unwrap()
    };
    let others: Vec<_> = (1..N)
        .map(|rank| {
            let body = body.clone();
            thread::spawn(move || body(form(&Store::connect(HOST, port, PATIENCE).unwrap(), rank)))
        })
        .collect();
    let mut results = vec![body(form(&store, 0))];
    results.extend(others.into_iter().map(|other| other.join().unwrap()));
    results.try_into().unwrap_or_else(|_| unreachable!("one result from each rank"))
}

/// Runs `body` on both ranks of a group.
fn on_two_ranks<R: Send + 'static>(
    generation: u64,
    body: impl Fn(ProcessGroup) -> R + Clone + Send + 'static,
) -> [R; 2] {
    on_ranks(generation, body)
}

/// 0, 1, 2, … modulo 120, shifted by `shift`: sums of two are exact in bf16.
fn ramp(length: i64, shift: i64, kind: Kind) -> Tensor {
    (Tensor::arange(length, (Kind::Int64, Device::Cpu)).remainder(120) + shift).to_kind(kind)
}

#[test]
fn sums_are_exact_and_the_same_on_both_ranks() {
    for kind in [Kind::Float, Kind::BFloat16] {
        // An odd length, so that the ranks' shares of the ring are not equal.
        let sums = on_two_ranks(1, move |group| {
            let tensor = ramp(100_003, i64::from(group.rank()) * 3, kind);
            group.all_reduce(&tensor).unwrap().wait().unwrap();
            tensor
        });
        let expected = ramp(100_003, 0, kind) + ramp(100_003, 3, kind);
        for sum in sums {
            assert_eq!(sum.kind(), kind);
            assert!(sum.equal(&expected), "{kind:?}");
        }
    }
}

#[test]
fn several_operations_are_under_way_at_once() {
    let sums = on_two_ranks(1, |group| {
        let tensors: Vec<Tensor> = (0..20).map(|i| ramp(5_000, i, Kind::Float)).collect();
        let works: Vec<_> = tensors.iter().map(|t| group.all_reduce(t).unwrap()).collect();
        for work in works {
            work.wait().unwrap();
        }
        tensors
    });
    for tensors in sums {
        for (shift, tensor) in (0..20).zip(tensors) {
            assert!(tensor.equal(&(ramp(5_000, shift, Kind::Float) * 2)));
        }
    }
}

#[test]
fn a_work_keeps_its_tensor_alive_and_says_when_it_is_done() {
    on_two_ranks(1, |group| {
        let work = group.all_reduce(&ramp(1_000_000, 0, Kind::Float)).unwrap();
        assert!(work.ended_within(PATIENCE));
        work.wait().unwrap();
    });
}

#[test]
fn each_rank_gets_its_share_of_the_sum() {
    for kind in [Kind::Float, Kind::BFloat16] {
        // Longer than what is added up at once.
        const SHARE: i64 = 70_001;
        let shares: [Tensor; 3] = on_ranks(1, move |group| {
            let flat = ramp(3 * SHARE, i64::from(group.rank()), kind);
            let received = flat.empty_like();
            let share = Tensor::empty([SHARE], (Kind::Float, Device::Cpu));
            group.reduce_scatter(&flat, &received, &share).unwrap().wait().unwrap();
            assert!(flat.equal(&ramp(3 * SHARE, i64::from(group.rank()), kind)));
            share
        });
        let sum = ramp(3 * SHARE, 1, Kind::Float) * 3;
        for (share, expected) in shares.iter().zip(sum.split(SHARE, 0)) {
            assert!(share.equal(&expected), "{kind:?}");
        }
    }
}

#[test]
fn bf16_is_summed_in_the_shares_kind() {
    on_two_ranks(1, |group| {
        // 256 + 1 is not to be had in bf16.
        let value = if group.rank() == 0 { 256.0 } else { 1.0 };
        let flat = Tensor::full([4], value, (Kind::BFloat16, Device::Cpu));
        let share = Tensor::empty([2], (Kind::Float, Device::Cpu));
        group.reduce_scatter(&flat, &flat.empty_like(), &share).unwrap().wait().unwrap();
        assert_eq!(share.double_value(&[0]), 257.0);
    });
}

#[test]
fn all_ranks_gather_all_shares_in_order() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let gathered: [Tensor; 3] = on_ranks(1, move |group| {
            let share = ramp(1_001, i64::from(group.rank()) * 7, kind);
            let whole = Tensor::empty([3 * 1_001], (kind, Device::Cpu));
            group.all_gather(&whole, &share).unwrap().wait().unwrap();
            whole
        });
        let expected = Tensor::cat(&[0, 7, 14].map(|shift| ramp(1_001, shift, kind)), 0);
        assert!(gathered.iter().all(|whole| whole.equal(&expected)), "{kind:?}");
    }
}

#[test]
fn shares_that_do_not_fit_are_refused() {
    on_two_ranks(1, |group| {
        let flat = ramp(5, 0, Kind::Float);
        let share = ramp(2, 0, Kind::Float);
        let error = group.reduce_scatter(&flat, &flat.empty_like(), &share).unwrap_err();
        assert!(matches!(error, CollectiveError::Share { flat: 5, share: 2, .. }), "{error}");
        let error = group.all_gather(&flat, &share).unwrap_err();
        assert!(matches!(error, CollectiveError::Share { operation: "all_gather", .. }), "{error}");
        group.barrier().unwrap();
    });
}

#[test]
fn a_work_knows_when_it_ended_however_late_it_is_asked() {
    on_two_ranks(1, |group| {
        const SILENCE: Duration = Duration::from_millis(500);
        group.barrier().unwrap();
        let before = Instant::now();
        if group.rank() == 1 {
            thread::sleep(SILENCE);
        }
        let work = group.all_reduce(&ramp(1_000, 0, Kind::Float)).unwrap();
        if group.rank() == 0 {
            assert!(!work.ended_within(Duration::from_millis(20)));
            assert_eq!(work.interval(), None);
        }
        assert!(work.ended_within(PATIENCE));
        let ended = Instant::now();
        thread::sleep(2 * SILENCE);
        let (start, end) = work.interval().unwrap();
        // Asked for late by rank 1, waited for by rank 0, and over long before it is asked.
        assert!(before <= start && end <= ended + SILENCE);
        if group.rank() == 0 {
            assert!(end - start >= SILENCE / 2, "{:?}", end - start);
        }
        work.wait().unwrap();
    });
}

#[test]
fn operations_that_are_asked_for_their_end_give_the_same() {
    let results: [_; 3] = on_ranks_ending(Ends::Asked, 1, |group| {
        let rank = i64::from(group.rank());
        let sum = ramp(100_003, rank, Kind::Float);
        let flat = ramp(3 * 70_001, rank, Kind::BFloat16);
        let received = flat.empty_like();
        let share = Tensor::empty([70_001], (Kind::Float, Device::Cpu));
        let whole = Tensor::empty([3 * 1_001], (Kind::Float, Device::Cpu));
        // All under way at once, and waited for in another order.
        let all_reduce = group.all_reduce(&sum).unwrap();
        let reduce_scatter = group.reduce_scatter(&flat, &received, &share).unwrap();
        let all_gather = group.all_gather(&whole, &ramp(1_001, rank * 7, Kind::Float)).unwrap();
        assert!(all_gather.ended_within(PATIENCE));
        assert!(all_gather.interval().is_some());
        all_gather.wait().unwrap();
        reduce_scatter.wait().unwrap();
        all_reduce.wait().unwrap();
        group.barrier().unwrap();
        (sum, share, whole)
    });
    let shares = (ramp(3 * 70_001, 1, Kind::Float) * 3).split(70_001, 0);
    let gathered = Tensor::cat(&[0, 7, 14].map(|shift| ramp(1_001, shift, Kind::Float)), 0);
    for ((sum, share, whole), expected) in results.iter().zip(shares) {
        assert!(sum.equal(&(ramp(100_003, 1, Kind::Float) * 3)));
        assert!(share.equal(&expected));
        assert!(whole.equal(&gathered));
    }
}

#[test]
fn an_operation_that_is_asked_for_its_end_is_given_up_in_time() {
    let (store, port) = Store::listen(HOST).unwrap();
    let (done, until_done) = std::sync::mpsc::channel::<()>();
    let asked = |store: &Store, rank, patience| {
        let member = Member { rank, world_size: 2 };
        ProcessGroup::gloo_ending(Ends::Asked, store, 1, member, patience, HOST).unwrap()
    };
    let peer = thread::spawn(move || {
        let _group = asked(&Store::connect(HOST, port, PATIENCE).unwrap(), 1, PATIENCE);
        let _ = until_done.recv_timeout(PATIENCE);
    });
    let group = asked(&store, 0, Duration::from_secs(2));
    let work = group.all_reduce(&ramp(1_000, 0, Kind::Float)).unwrap();
    assert!(!work.ended_within(Duration::from_millis(20)));
    let start = Instant::now();
    let error = work.wait().unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(error.to_string().starts_with("all_reduce on rank 0 of 2: "), "{error}");
    drop(done);
    peer.join().unwrap();
}

#[cfg(feature = "cuda")]
#[test]
fn without_a_gpu_nccl_says_so() {
    if tch::Cuda::is_available() {
        return;
    }
    let (store, _) = Store::listen(HOST).unwrap();
    let error = ProcessGroup::form(&store, 1, 0, 1, PATIENCE, HOST, Device::Cuda(0)).unwrap_err();
    assert!(error.to_string().contains("no GPUs found"), "{error}");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_nccl_names_the_one_to_take() {
    let (store, _) = Store::listen(HOST).unwrap();
    let error = ProcessGroup::form(&store, 1, 0, 1, PATIENCE, HOST, Device::Cuda(0)).unwrap_err();
    assert!(error.to_string().contains("--features cuda"), "{error}");
}

#[test]
fn broadcast_takes_the_roots_values() {
    let received = on_two_ranks(1, |group| {
        let tensor = ramp(17, i64::from(group.rank()) * 50, Kind::Float);
        group.broadcast(&tensor, 1).unwrap();
        group.barrier().unwrap();
        tensor
    });
    for tensor in received {
        assert!(tensor.equal(&ramp(17, 50, Kind::Float)));
    }
}

#[test]
fn generations_share_a_store_without_meeting() {
    let (store, port) = Store::listen(HOST).unwrap();
    let peer = thread::spawn(move || {
        let store = Store::connect(HOST, port, PATIENCE).unwrap();
        for generation in [1, 2] {
            let group = ProcessGroup::gloo(&store, generation, 1, 2, PATIENCE, HOST).unwrap();
            group.barrier().unwrap();
        }
    });
    for generation in [1, 2] {
        let group = ProcessGroup::gloo(&store, generation, 0, 2, PATIENCE, HOST).unwrap();
        group.barrier().unwrap();
    }
    peer.join().unwrap();
}

#[test]
fn a_view_with_strides_is_refused() {
    on_two_ranks(1, |group| {
        let error = group.all_reduce(&ramp(12, 0, Kind::Float).view([3, 4]).tr()).unwrap_err();
        assert!(matches!(error, CollectiveError::NotContiguous { .. }), "{error}");
        // Also so that neither rank closes its connections while the other still forms the group.
        group.barrier().unwrap();
    });
}

#[test]
fn the_store_listens_at_its_host_only() {
    let (_store, port) = Store::listen(HOST).unwrap();
    assert!(TcpStream::connect((HOST, port)).is_ok());
    assert!(TcpStream::connect(("127.0.0.2", port)).is_err());
}

#[test]
fn a_host_that_is_not_here_is_refused() {
    // 192.0.2.0/24 is set aside for documentation: no machine has such an address.
    let error = Store::listen("192.0.2.1").unwrap_err();
    assert!(matches!(error, CollectiveError::Bind { .. }), "{error}");
}

#[test]
fn a_store_that_is_not_there_is_an_error_in_time() {
    let (store, port) = Store::listen(HOST).unwrap();
    drop(store);
    let start = Instant::now();
    let error = Store::connect(HOST, port, Duration::from_secs(2)).unwrap_err();
    assert!(matches!(error, CollectiveError::Store { operation: "connect", .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_missing_peer_is_an_error_in_time() {
    let (store, _) = Store::listen(HOST).unwrap();
    let start = Instant::now();
    let error = ProcessGroup::gloo(&store, 1, 0, 2, Duration::from_secs(2), HOST).unwrap_err();
    assert!(
        matches!(error, CollectiveError::Operation { operation: "form group", rank: 0, .. }),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_silent_peer_is_an_error_in_time() {
    let (store, port) = Store::listen(HOST).unwrap();
    let (done, until_done) = std::sync::mpsc::channel::<()>();
    let patience = Duration::from_secs(2);
    let peer = thread::spawn(move || {
        let store = Store::connect(HOST, port, PATIENCE).unwrap();
        let _group = ProcessGroup::gloo(&store, 1, 1, 2, patience, HOST).unwrap();
        // Connected, and never joining.
        let _ = until_done.recv_timeout(PATIENCE);
    });
    let group = ProcessGroup::gloo(&store, 1, 0, 2, patience, HOST).unwrap();
    let start = Instant::now();
    let error = group.all_reduce(&ramp(1_000, 0, Kind::Float)).unwrap().wait().unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(error.to_string().starts_with("all_reduce on rank 0 of 2: "), "{error}");
    drop(done);
    peer.join().unwrap();
}

#[test]
fn a_killed_peer_is_an_error_at_once() {
    let (store, port) = Store::listen(HOST).unwrap();
    let mut peer = Peer::start(port);
    let group = ProcessGroup::gloo(&store, 1, 0, 2, PATIENCE, HOST).unwrap();
    peer.wait_until_reduced(&group);
    let work = group.all_reduce(&ramp(1_000, 0, Kind::Float)).unwrap();
    let start = Instant::now();
    peer.process.kill().unwrap();
    let error = work.wait().unwrap_err();
    assert!(matches!(error, CollectiveError::Operation { operation: "all_reduce", .. }));
    // Long before the timeout: the closed connection tells.
    assert!(start.elapsed() < PATIENCE / 4, "{:?}: {error}", start.elapsed());
}

/// Rank 1 in a process of its own, running [`rank_1_of_two`].
struct Peer {
    process: Child,
}

impl Peer {
    fn start(port: u16) -> Self {
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["collective::tests::rank_1_of_two", "--exact", "--ignored", "--nocapture"])
            .env("DRIFT_TEST_STORE_PORT", port.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self { process }
    }

    /// Joins the peer in one reduction, and waits for it to say that it is done.
    fn wait_until_reduced(&mut self, group: &ProcessGroup) {
        let tensor = ramp(1_000, 0, Kind::Float);
        group.all_reduce(&tensor).unwrap().wait().unwrap();
        assert!(tensor.equal(&(ramp(1_000, 0, Kind::Float) * 2)));
        let lines = BufReader::new(self.process.stdout.take().unwrap()).lines();
        lines.map_while(Result::ok).find(|line| line.ends_with("reduced")).expect("peer's word");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "the other process of a_killed_peer_is_an_error_at_once"]
fn rank_1_of_two() {
    let port = std::env::var("DRIFT_TEST_STORE_PORT").unwrap().parse().unwrap();
    let store = Store::connect(HOST, port, PATIENCE).unwrap();
    let group = ProcessGroup::gloo(&store, 1, 1, 2, PATIENCE, HOST).unwrap();
    group.all_reduce(&ramp(1_000, 0, Kind::Float)).unwrap().wait().unwrap();
    let mut out = std::io::stdout().lock();
    writeln!(out, "reduced").unwrap();
    out.flush().unwrap();
    thread::sleep(PATIENCE);
}
