// The C face of libtorch's c10d: stores, process groups, pending operations.
//
// Rules of this file:
// - No C++ exception crosses into Rust. Each function that can fail runs inside
//   `guarded`, which turns an exception into text that the caller must free.
// - A handle is one intrusive pointer on the heap, made here and freed here.
// - A group is held as `c10d::Backend`: only its constructor knows which
//   backend it is, so whatever works over Gloo works over NCCL (`nccl.cpp`).

#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "handles.hpp"

using namespace drift;

extern "C" {

void drift_free_text(char* text) { std::free(text); }

// Serves a store on `socket`, which is bound and listening on `port`, and
// connects to it. Returns at once, without waiting for anyone.
StoreHandle* drift_store_listen(const char* host, std::uint16_t port,
                                int socket, char** error) {
  return guarded<StoreHandle*>(error, nullptr, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = true;
    options.waitWorkers = false;
    options.masterListenFd = socket;
    return new StoreHandle{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

StoreHandle* drift_store_connect(const char* host, std::uint16_t port,
                                 std::int64_t timeout_ms, char** error) {
  return guarded<StoreHandle*>(error, nullptr, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    return new StoreHandle{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

void drift_store_free(StoreHandle* store) { delete store; }

// With `asked`, the end of an operation is learned as over NCCL, for tests.
GroupHandle* drift_group_gloo(const StoreHandle* store, const char* prefix,
                              int rank, int world_size,
                              std::int64_t timeout_ms, const char* host,
                              bool asked, char** error) {
  return guarded<GroupHandle*>(error, nullptr, [&] {
    auto options = c10d::ProcessGroupGloo::Options::create(
        milliseconds(timeout_ms));
    options->devices.push_back(
        c10d::ProcessGroupGloo::createDeviceForHostname(host));
    auto keys = c10::make_intrusive<c10d::PrefixStore>(prefix, store->object);
    keys->setTimeout(milliseconds(timeout_ms));
    return new GroupHandle{c10::make_intrusive<c10d::ProcessGroupGloo>(
                               keys, rank, world_size, options),
                           asked ? Ends::Asked : Ends::Told,
                           milliseconds(timeout_ms)};
  });
}

// What the group still has under way is given up.
void drift_group_free(GroupHandle* group) {
  char* error = nullptr;
  // Gloo has nothing to abort: its operations end with their connections.
  guarded<bool>(&error, false, [&] {
    group->object->abort();
    return true;
  });
  std::free(error);
  delete group;
}

WorkHandle* drift_all_reduce(const GroupHandle* group, const at::Tensor* tensor,
                             char** error) {
  return guarded<WorkHandle*>(error, nullptr, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    return hold(*group, group->object->allreduce(tensors));
  });
}

WorkHandle* drift_broadcast(const GroupHandle* group, const at::Tensor* tensor,
                            int root, char** error) {
  return guarded<WorkHandle*>(error, nullptr, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return hold(*group, group->object->broadcast(tensors, options));
  });
}

// Row j of `sent`, seen as one row per rank, goes to rank j; row j of `received`
// comes from it.
WorkHandle* drift_all_to_all(const GroupHandle* group,
                             const at::Tensor* received, const at::Tensor* sent,
                             char** error) {
  return guarded<WorkHandle*>(error, nullptr, [&] {
    at::Tensor output = *received;
    at::Tensor input = *sent;
    // Without counts the rows are equal.
    std::vector<std::int64_t> output_counts;
    std::vector<std::int64_t> input_counts;
    return hold(*group,
                group->object->alltoall_base(output, input, output_counts,
                                             input_counts));
  });
}

WorkHandle* drift_all_gather(const GroupHandle* group, const at::Tensor* whole,
                             const at::Tensor* share, char** error) {
  return guarded<WorkHandle*>(error, nullptr, [&] {
    at::Tensor output = *whole;
    at::Tensor input = *share;
    return hold(*group, group->object->_allgather_base(output, input));
  });
}

WorkHandle* drift_barrier(const GroupHandle* group, char** error) {
  return guarded<WorkHandle*>(error, nullptr, [&] {
    return hold(*group, group->object->barrier(group->barrier));
  });
}

// Whether the operation has ended, well or badly, now or within `microseconds`.
bool drift_work_ended_within(const WorkHandle* work,
                             std::int64_t microseconds) {
  return work->end->within(std::chrono::microseconds(microseconds));
}

// How long ago the operation ended; -1 while it is under way.
std::int64_t drift_work_nanoseconds_since_end(const WorkHandle* work) {
  const auto end = work->end->time();
  if (!end) {
    return -1;
  }
  return std::chrono::nanoseconds(Clock::now() - *end).count();
}

bool drift_work_wait(const WorkHandle* work, char** error) {
  return guarded<bool>(error, false, [&] {
    work->end->await();
    if (!work->object->wait()) {
      throw std::runtime_error("the operation was aborted");
    }
    return true;
  });
}

void drift_work_free(WorkHandle* work) { delete work; }

}  // extern "C"
