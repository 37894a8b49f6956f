// std::format for compilers whose standard library lacks it (GCC before 13), as far as mlx-c's
// printing of objects uses it: "{}" without options. Included before every file of mlx-c.
#pragma once
#ifdef __cplusplus
#include <version>
#ifndef __cpp_lib_format
#include <cstddef>
#include <sstream>
#include <string>

namespace bitnet_shim {
// Writes `text` up to the next "{}", then the values that are left, one for each "{}".
inline void write(std::ostringstream& out, const std::string& text, std::size_t at) {
  out << text.substr(at);
}
template <class First, class... Rest>
void write(std::ostringstream& out, const std::string& text, std::size_t at, const First& first,
           const Rest&... rest) {
  const std::size_t hole = text.find("{}", at);
  if (hole == std::string::npos) {
    write(out, text, at);
    return;
  }
  out << text.substr(at, hole - at) << first;
  write(out, text, hole + 2, rest...);
}
}  // namespace bitnet_shim

namespace std {
template <class... Values>
string format(const char* text, const Values&... values) {
  ostringstream out;
  bitnet_shim::write(out, text, 0, values...);
  return out.str();
}
}  // namespace std
#endif
#endif
