// What `ProcessGroupGloo.hpp` needs to know of Gloo, whose own headers PyTorch's
// wheel leaves out. The build script puts this file in the place of each of them.
//
// Nothing here is ever constructed or laid out on this side: the classes are
// held by pointer, made and destroyed inside libtorch. The virtual functions of
// `Store` are those that c10d's `GlooStore` says it overrides, and they are
// declared so that the compiler accepts that word.
#pragma once

#include <chrono>
#include <string>
#include <vector>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

namespace transport {

class Device {
 public:
  virtual ~Device() = 0;
};

class UnboundBuffer {
 public:
  virtual ~UnboundBuffer() = 0;
};

}  // namespace transport

namespace rendezvous {

class Store {
 public:
  virtual ~Store();
  virtual void set(const std::string& key, const std::vector<char>& value) = 0;
  virtual std::vector<char> get(const std::string& key) = 0;
  virtual void wait(const std::vector<std::string>& keys) = 0;
  virtual void wait(const std::vector<std::string>& keys,
                    const std::chrono::milliseconds& timeout) = 0;
};

}  // namespace rendezvous
}  // namespace gloo
