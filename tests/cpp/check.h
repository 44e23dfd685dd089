// A test program in one header: TEST registers, CHECK counts, main runs all and fails if any check
// or exception did. Included by exactly one source of a program.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

namespace test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  std::printf("%s:%d: %s\n", file, line, what.c_str());
  ++failures();
}

}  // namespace test

#define TEST(name)                                                  \
  static void name();                                               \
  static const test::Registration registration_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) test::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)

// The statement throws this type, and the message holds this text.
#define CHECK_THROWS(Type, text, statement)                                                    \
  do {                                                                                         \
    try {                                                                                      \
      statement;                                                                               \
      test::fail(__FILE__, __LINE__, "did not throw: " #statement);                            \
    } catch (const Type& error) {                                                              \
      if (std::string(error.what()).find(text) == std::string::npos)                           \
        test::fail(__FILE__, __LINE__, std::string("threw another message: ") + error.what()); \
    }                                                                                          \
  } while (false)

int main() {
  for (const test::Case& one : test::cases()) {
    const int before = test::failures();
    try {
      one.run();
    } catch (const std::exception& error) {
      test::fail(one.name, 0, std::string("threw: ") + error.what());
    }
    std::printf("%-4s %s\n", test::failures() == before ? "ok" : "FAIL", one.name);
  }
  return test::failures() == 0 && !test::cases().empty() ? 0 : 1;
}
