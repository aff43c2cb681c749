// The C face of libtorch's c10d: stores, process groups, pending operations.
//
// Rules of this file:
// - No C++ exception crosses into Rust. Each function that can fail runs inside
//   `guarded`, which turns an exception into text that the caller must free.
// - A handle is one intrusive pointer on the heap, made here and freed here.
// - A group is held as `c10d::Backend`: only its constructor knows which
//   backend it is, so whatever works over Gloo works over the next one.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

namespace {

// One counted reference, so that Rust can hold it as an opaque pointer.
template <typename T>
struct Handle {
  c10::intrusive_ptr<T> object;
};

using StoreHandle = Handle<c10d::Store>;
using GroupHandle = Handle<c10d::Backend>;

using Clock = std::chrono::steady_clock;

// Learns from the backend's own thread when an operation ends.
class Stopwatch {
 public:
  void stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_ = Clock::now();
    ended_.notify_all();
  }

  // Whether the operation has ended, now or within `patience`.
  bool wait(std::chrono::microseconds patience) {
    std::unique_lock<std::mutex> lock(mutex_);
    return ended_.wait_for(lock, patience, [&] { return end_.has_value(); });
  }

  std::optional<Clock::time_point> end() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return end_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  std::optional<Clock::time_point> end_;
};

struct WorkHandle {
  c10::intrusive_ptr<c10d::Work> object;
  // Shared with the backend's callback, which may outlive the handle.
  std::shared_ptr<Stopwatch> watch;
};

std::chrono::milliseconds milliseconds(std::int64_t count) {
  return std::chrono::milliseconds(count);
}

// Runs `body` and gives what it gives; on an exception, `failed`, with the
// exception's text in `*error`.
template <typename Result, typename Body>
Result guarded(char** error, Result failed, Body body) noexcept {
  try {
    return body();
  } catch (const c10::Error& e) {
    // Without the C++ backtrace: it says nothing to a user.
    *error = strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    *error = strdup(e.what());
  } catch (...) {
    *error = strdup("an exception that says nothing about itself");
  }
  return failed;
}

WorkHandle* hold(c10::intrusive_ptr<c10d::Work> work) {
  auto watch = std::make_shared<Stopwatch>();
  // Called on failure too; at once, where the operation has ended already.
  work->getFuture()->addCallback(
      [watch](c10::ivalue::Future&) { watch->stop(); });
  return new WorkHandle{std::move(work), std::move(watch)};
}

}  // namespace

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

GroupHandle* drift_group_gloo(const StoreHandle* store, const char* prefix,
                              int rank, int world_size,
                              std::int64_t timeout_ms, const char* host,
                              char** error) {
  return guarded<GroupHandle*>(error, nullptr, [&] {
    auto options = c10d::ProcessGroupGloo::Options::create(
        milliseconds(timeout_ms));
    options->devices.push_back(
        c10d::ProcessGroupGloo::createDeviceForHostname(host));
    auto keys = c10::make_intrusive<c10d::PrefixStore>(prefix, store->object);
    keys->setTimeout(milliseconds(timeout_ms));
    return new GroupHandle{c10::make_intrusive<c10d::ProcessGroupGloo>(
        keys, rank, world_size, options)};
  });
}

void drift_group_free(GroupHandle* group) { delete group; }

WorkHandle* drift_all_reduce(const GroupHandle* group, const at::Tensor* tensor,
                             char** error) {
  return guarded<WorkHandle*>(error, nullptr, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    return hold(group->object->allreduce(tensors));
  });
}

WorkHandle* drift_broadcast(const GroupHandle* group, const at::Tensor* tensor,
                            int root, char** error) {
  return guarded<WorkHandle*>(error, nullptr, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return hold(group->object->broadcast(tensors, options));
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
    return hold(group->object->alltoall_base(output, input, output_counts,
                                             input_counts));
  });
}

WorkHandle* drift_all_gather(const GroupHandle* group, const at::Tensor* whole,
                             const at::Tensor* share, char** error) {
  return guarded<WorkHandle*>(error, nullptr, [&] {
    at::Tensor output = *whole;
    at::Tensor input = *share;
    return hold(group->object->_allgather_base(output, input));
  });
}

WorkHandle* drift_barrier(const GroupHandle* group, char** error) {
  return guarded<WorkHandle*>(
      error, nullptr, [&] { return hold(group->object->barrier()); });
}

// Whether the operation has ended, well or badly, now or within `microseconds`.
bool drift_work_ended_within(const WorkHandle* work,
                             std::int64_t microseconds) {
  return work->watch->wait(std::chrono::microseconds(microseconds));
}

// How long ago the operation ended; -1 while it is under way.
std::int64_t drift_work_nanoseconds_since_end(const WorkHandle* work) {
  const auto end = work->watch->end();
  if (!end) {
    return -1;
  }
  return std::chrono::nanoseconds(Clock::now() - *end).count();
}

bool drift_work_wait(const WorkHandle* work, char** error) {
  return guarded<bool>(error, false, [&] {
    if (!work->object->wait()) {
      throw std::runtime_error("the operation was aborted");
    }
    return true;
  });
}

void drift_work_free(WorkHandle* work) { delete work; }

}  // extern "C"
