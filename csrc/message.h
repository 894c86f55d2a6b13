// Error messages, put together without streams. Where a compiler links libstdc++ statically, a
// process holds two copies of it, and a number that one copy writes to a stream of the other is
// lost or ends the process; TORCH_CHECK of several parts makes such streams.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <concepts>
#include <cstdio>
#include <string>
#include <string_view>

namespace drrlhf {

inline std::string text(std::string_view x) { return std::string(x); }
inline std::string text(std::integral auto x) { return std::to_string(x); }
inline std::string text(at::ScalarType x) { return c10::toString(x); }
inline std::string text(const at::Device& x) { return x.str(); }

// With the six digits of a stream.
inline std::string text(double x) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", x);
  return digits;
}

inline std::string text(at::IntArrayRef shape) {
  std::string all;
  for (const std::int64_t size : shape) all += (all.empty() ? "" : ", ") + text(size);
  return "[" + all + "]";
}

template <class... Parts>
std::string message(const Parts&... parts) {
  return (std::string() + ... + text(parts));
}

}  // namespace drrlhf

// TORCH_CHECK and TORCH_CHECK_VALUE; a message that is one string goes through no stream.
#define DRRLHF_CHECK(condition, ...) TORCH_CHECK(condition, ::drrlhf::message(__VA_ARGS__))
#define DRRLHF_CHECK_VALUE(condition, ...) \
  TORCH_CHECK_VALUE(condition, ::drrlhf::message(__VA_ARGS__))
