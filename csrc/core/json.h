// A strict JSON reader and writer (RFC 8259): what ModelConfig and safetensors headers need, no
// more.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace medusa::json {

struct Member;

// Kept as text: whoever asks decides whether it is an integer, and floats are rounded once.
struct Number {
  std::string text;
};

class Value {
 public:
  using Array = std::vector<Value>;
  using Object = std::vector<Member>;  // sorted by key, keys distinct

  Value() = default;  // null
  explicit Value(bool value) : data_(value) {}
  explicit Value(Number value) : data_(std::move(value)) {}
  explicit Value(std::string value) : data_(std::move(value)) {}
  explicit Value(Array value) : data_(std::move(value)) {}
  explicit Value(Object value);

  const char* kind() const;  // "an object", "a string", … for messages

  // ArgumentError "<where>: found <kind>, wanted <kind>" on another kind or a value out of range.
  bool as_bool(std::string_view where) const;
  int64_t as_int(std::string_view where) const;
  float as_float(std::string_view where) const;
  const std::string& as_string(std::string_view where) const;
  const Array& as_array(std::string_view where) const;
  const Object& as_object(std::string_view where) const;

 private:
  std::variant<std::monostate, bool, Number, std::string, Array, Object> data_;
};

struct Member {
  std::string key;
  Value value;
};

inline Value::Value(Object value) : data_(std::move(value)) {}

// Refuses what RFC 8259 refuses, and invalid UTF-8, duplicate keys, nesting below 32 levels and
// more than 2^22 values. ArgumentError "<what>: byte <offset>: …".
Value parse(std::string_view text, std::string_view what);

const Value* find(const Value::Object& object, std::string_view key);  // null: absent

std::string quote(std::string_view text);  // a JSON string; `text` is UTF-8
std::string number(float value);  // the shortest text that reads back to the same bits; finite only

}  // namespace medusa::json
