// Groups over NCCL, for tensors in the memory of GPUs. Compiled with the feature
// `cuda` alone; all that a group does once it is there is in `bridge.cpp`.

#include <utility>
#include <vector>

#include <c10/cuda/CUDAFunctions.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "handles.hpp"

using namespace drift;

namespace {

// How much longer than we wait c10d's watchdog does: by then our side has given
// the operation up by itself, or hangs, and the flight recorder is to be written.
constexpr std::chrono::seconds kWatchdogDelay{5};

// Waits until every rank is here. NCCL's own rendezvous has no timeout.
void await_all(c10d::Store& keys, int rank, int world_size) {
  std::vector<std::string> all;
  for (int peer = 0; peer < world_size; ++peer) {
    all.push_back("here/" + std::to_string(peer));
  }
  keys.set(all[rank], std::vector<std::uint8_t>{1});
  keys.wait(all);
}

}  // namespace

extern "C" {

// What c10d's NCCL backend reads from the environment, where the user says
// nothing else. To be called while the process has one thread.
void drift_nccl_defaults() {
  // A fault is ours to handle: no thread of c10d's is to end the process.
  setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", 0);
  // The flight recorder: what was under way on each rank, written on a timeout.
  setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000", 0);
  setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", 0);
}

// Makes `device` the calling thread's own, so that nothing is allocated on GPU 0
// by the workers of the others.
bool drift_cuda_use(int device, char** error) {
  return guarded<bool>(error, false, [&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    return true;
  });
}

GroupHandle* drift_group_nccl(const StoreHandle* store, const char* prefix,
                              int rank, int world_size,
                              std::int64_t timeout_ms, int device,
                              char** error) {
  return guarded<GroupHandle*>(error, nullptr, [&] {
    const auto timeout = milliseconds(timeout_ms);
    auto keys = c10::make_intrusive<c10d::PrefixStore>(prefix, store->object);
    keys->setTimeout(timeout);
    // Backward goes on beside a reduction: what the reduction needs comes first.
    auto options = c10d::ProcessGroupNCCL::Options::create(
        /*is_high_priority_stream=*/true);
    options->timeout = timeout + kWatchdogDelay;
    auto group = c10::make_intrusive<c10d::ProcessGroupNCCL>(
        keys, rank, world_size, options);
    await_all(*keys, rank, world_size);
    const at::Device gpu(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    group->setBoundDeviceId(gpu);
    group->eagerConnectSingleDevice(gpu);
    c10d::BarrierOptions barrier;
    barrier.device = gpu;
    auto broken = [group] {
      return group->getError() != c10d::ErrorType::SUCCESS;
    };
    return new GroupHandle{group, Ends::Asked, timeout, barrier, broken};
  });
}

}  // extern "C"
