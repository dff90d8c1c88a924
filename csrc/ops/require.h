// How an op refuses: the message is what the user reads, and begins with the op. STD_TORCH_CHECK would begin it with
// the name of a C++ function and the path of its file on the machine that compiled it.
#pragma once
#include <sstream>
#include <stdexcept>

namespace petl {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace petl

// The parts of the message are computed only where the condition does not hold.
#define PETL_REQUIRE(condition, ...)               \
  do {                                             \
    if (!(condition)) ::petl::refuse(__VA_ARGS__); \
  } while (false)
