// What the bridge's files share: handles that Rust holds, how an exception
// becomes text, and how the end of an operation is learned.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

namespace drift {

using Clock = std::chrono::steady_clock;

inline std::chrono::milliseconds milliseconds(std::int64_t count) {
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

// How a backend's operations end.
enum class Ends {
  // The backend's own thread tells.
  Told,
  // On the device, behind the host's back: it is asked again and again.
  Asked,
};

// One counted reference each, so that Rust can hold it as an opaque pointer.
struct StoreHandle {
  c10::intrusive_ptr<c10d::Store> object;
};

struct GroupHandle {
  c10::intrusive_ptr<c10d::Backend> object;
  Ends ends;
  std::chrono::milliseconds timeout;
  c10d::BarrierOptions barrier{};
  // Whether its operations end with garbage from now on; nothing where each of
  // them tells of its own failure.
  std::function<bool()> broken{};
};

// When an operation ended.
class End {
 public:
  virtual ~End() = default;
  // Whether it has, well or badly, now or within `patience`.
  virtual bool within(std::chrono::microseconds patience) = 0;
  virtual std::optional<Clock::time_point> time() = 0;
  // Returns when the operation has ended; throws where it ended badly and its
  // `Work` would not say so.
  virtual void await() = 0;
};

class Told : public End {
 public:
  void stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_ = Clock::now();
    ended_.notify_all();
  }

  bool within(std::chrono::microseconds patience) override {
    std::unique_lock<std::mutex> lock(mutex_);
    return ended_.wait_for(lock, patience, [&] { return end_.has_value(); });
  }

  std::optional<Clock::time_point> time() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return end_;
  }

  // `Work::wait` does both.
  void await() override {}

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  std::optional<Clock::time_point> end_;
};

// Used by the one thread that holds the work.
class Asked : public End {
 public:
  Asked(c10::intrusive_ptr<c10d::Work> work, const GroupHandle& group)
      : work_(std::move(work)),
        timeout_(group.timeout),
        broken_(group.broken),
        deadline_(Clock::now() + group.timeout) {}

  bool within(std::chrono::microseconds patience) override {
    const auto until = Clock::now() + patience;
    while (!look()) {
      if (Clock::now() >= until) {
        return false;
      }
      // A look costs a query of the device's event; an operation takes longer.
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return true;
  }

  std::optional<Clock::time_point> time() override {
    look();
    return end_;
  }

  void await() override {
    while (!within(std::chrono::seconds(1))) {
    }
    if (const auto exception = work_->exception()) {
      std::rethrow_exception(exception);
    }
    if (late_) {
      throw std::runtime_error("not done after " +
                               std::to_string(timeout_.count()) + " ms");
    }
    // An operation whose communicator was given up ends too.
    if (broken_ && broken_()) {
      throw std::runtime_error(
          "the group is broken: a peer is gone or did not come in time");
    }
  }

 private:
  // Whether it has ended; notes when that was first seen.
  bool look() {
    if (!end_) {
      if (work_->isCompleted()) {
        end_ = Clock::now();
      } else if (Clock::now() >= deadline_) {
        late_ = true;
        end_ = Clock::now();
      }
    }
    return end_.has_value();
  }

  c10::intrusive_ptr<c10d::Work> work_;
  std::chrono::milliseconds timeout_;
  std::function<bool()> broken_;
  Clock::time_point deadline_;
  std::optional<Clock::time_point> end_;
  bool late_ = false;
};

struct WorkHandle {
  c10::intrusive_ptr<c10d::Work> object;
  // Shared with the backend's callback, which may outlive the handle.
  std::shared_ptr<End> end;
};

inline WorkHandle* hold(const GroupHandle& group,
                        c10::intrusive_ptr<c10d::Work> work) {
  if (group.ends == Ends::Asked) {
    auto end = std::make_shared<Asked>(work, group);
    return new WorkHandle{std::move(work), std::move(end)};
  }
  auto told = std::make_shared<Told>();
  // Called on failure too; at once, where the operation has ended already.
  work->getFuture()->addCallback(
      [told](c10::ivalue::Future&) { told->stop(); });
  return new WorkHandle{std::move(work), std::move(told)};
}

}  // namespace drift
