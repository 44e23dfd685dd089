// SPDX-License-Identifier: Apache-2.0
#include "core/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>

#include "medusa/error.h"

namespace medusa::json {
namespace {

constexpr int kMaxDepth = 32;
constexpr int64_t kMaxValues = int64_t{1} << 22;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(uint32_t code, std::string& out) {
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | (code >> 6));
    tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | (code >> 12));
    tail(6), tail(0);
  } else {
    out += static_cast<char>(0xF0 | (code >> 18));
    tail(12), tail(6), tail(0);
  }
}

class Parser {
 public:
  Parser(std::string_view text, std::string_view what) : text_(text), what_(what) {}

  Value document() {
    Value value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the end of the value");
    return value;
  }

 private:
  [[noreturn]] void fail(std::string_view problem) const {
    throw ArgumentError(concat(what_, ": not valid JSON: byte ", at_, ": ", problem));
  }

  bool at_end() const { return at_ == text_.size(); }
  char peek() const { return at_end() ? '\0' : text_[at_]; }

  bool accept(char c) {
    if (at_end() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!accept(c)) fail(concat("wanted '", c, "'"));
  }

  void skip_space() {
    while (!at_end() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) {
      ++at_;
    }
  }

  void word(std::string_view text) {
    if (text_.substr(at_, text.size()) != text) fail("wanted a value");
    at_ += text.size();
  }

  Value parse_value(int depth) {
    skip_space();
    if (depth >= kMaxDepth) fail(concat("nested deeper than ", kMaxDepth, " levels"));
    if (++num_values_ > kMaxValues) fail(concat("more than ", kMaxValues, " values"));
    switch (peek()) {
      case '{':
        return parse_object(depth);
      case '[':
        return parse_array(depth);
      case '"':
        return Value(parse_string());
      case 't':
        word("true");
        return Value(true);
      case 'f':
        word("false");
        return Value(false);
      case 'n':
        word("null");
        return Value();
      default:
        return parse_number();
    }
  }

  Value parse_object(int depth) {
    const size_t start = at_;
    expect('{');
    Value::Object object;
    skip_space();
    if (!accept('}')) {
      do {
        skip_space();
        std::string key = parse_string();
        skip_space();
        expect(':');
        object.push_back({std::move(key), parse_value(depth + 1)});
        skip_space();
      } while (accept(','));
      expect('}');
    }
    std::sort(object.begin(), object.end(),
              [](const Member& a, const Member& b) { return a.key < b.key; });
    const auto twice =
        std::adjacent_find(object.begin(), object.end(),
                           [](const Member& a, const Member& b) { return a.key == b.key; });
    if (twice != object.end()) {
      at_ = start;
      fail(concat("the object names ", quote(twice->key), " twice"));
    }
    return Value(std::move(object));
  }

  Value parse_array(int depth) {
    expect('[');
    Value::Array array;
    skip_space();
    if (!accept(']')) {
      do {
        array.push_back(parse_value(depth + 1));
        skip_space();
      } while (accept(','));
      expect(']');
    }
    return Value(std::move(array));
  }

  void digits() {
    if (!is_digit(peek())) fail("wanted a value or a digit");
    while (is_digit(peek())) ++at_;
  }

  Value parse_number() {
    const size_t start = at_;
    accept('-');
    if (!accept('0')) digits();  // no leading zeros
    if (accept('.')) digits();
    if (accept('e') || accept('E')) {
      if (!accept('+')) accept('-');
      digits();
    }
    return Value(Number{std::string(text_.substr(start, at_ - start))});
  }

  std::string parse_string() {
    expect('"');
    std::string out;
    while (true) {
      if (at_end()) fail("a string without its end");
      const auto c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') break;
      if (c < 0x20) fail("a control character inside a string");
      if (c == '\\') {
        ++at_;
        parse_escape(out);
      } else if (c < 0x80) {
        out += text_[at_++];
      } else {
        parse_multibyte(out);
      }
    }
    ++at_;
    return out;
  }

  void parse_escape(std::string& out) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    if (accept('u')) {
      uint32_t code = parse_hex4();
      if (code >= 0xD800 && code < 0xDC00) {
        if (!accept('\\') || !accept('u')) fail("half of a surrogate pair");
        const uint32_t low = parse_hex4();
        if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
      } else if (code >= 0xDC00 && code < 0xE000) {
        fail("half of a surrogate pair");
      }
      append_utf8(code, out);
      return;
    }
    const size_t index = at_end() ? std::string_view::npos : kNames.find(text_[at_]);
    if (index == std::string_view::npos) fail("an unknown escape");
    out += kMeanings[index];
    ++at_;
  }

  uint32_t parse_hex4() {
    uint32_t code = 0;
    const std::string_view hex = text_.substr(at_, 4);
    const auto [end, error] = std::from_chars(hex.data(), hex.data() + hex.size(), code, 16);
    if (hex.size() != 4 || error != std::errc() || end != hex.data() + 4) {
      fail("wanted four hexadecimal digits");
    }
    at_ += 4;
    return code;
  }

  // One character of two to four bytes; overlong forms, surrogates and codes above U+10FFFF are no
  // UTF-8.
  void parse_multibyte(std::string& out) {
    const auto lead = static_cast<unsigned char>(text_[at_]);
    const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    constexpr uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
    if (lead < 0xC0 || lead > 0xF4 || text_.size() - at_ < length) fail("invalid UTF-8");
    uint32_t code = lead & (0xFFU >> (length + 1));
    for (size_t i = 1; i < length; ++i) {
      const auto byte = static_cast<unsigned char>(text_[at_ + i]);
      if ((byte & 0xC0) != 0x80) fail("invalid UTF-8");
      code = (code << 6) | (byte & 0x3F);
    }
    if (code < kSmallest[length] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
      fail("invalid UTF-8");
    }
    out.append(text_, at_, length);
    at_ += length;
  }

  std::string_view text_, what_;
  size_t at_ = 0;
  int64_t num_values_ = 0;
};

template <class T, class Data>
const T& get(const Data& data, const Value& value, std::string_view where, const char* wanted) {
  const T* found = std::get_if<T>(&data);
  MEDUSA_CHECK_ARG(found != nullptr, where, ": found ", value.kind(), ", wanted ", wanted);
  return *found;
}

// std::from_chars of floats is missing from some standard libraries; a stream in the "C" locale is
// not.
bool read_float(const std::string& text, float& value) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  return static_cast<bool>(in >> value) && std::isfinite(value);
}

}  // namespace

const char* Value::kind() const {
  constexpr const char* kKinds[] = {"null",     "true or false", "a number",
                                    "a string", "an array",      "an object"};
  return kKinds[data_.index()];
}

bool Value::as_bool(std::string_view where) const {
  return get<bool>(data_, *this, where, "true or false");
}

int64_t Value::as_int(std::string_view where) const {
  const std::string& text = get<Number>(data_, *this, where, "an integer").text;
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  MEDUSA_CHECK_ARG(error == std::errc() && end == text.data() + text.size(), where, ": found ",
                   text, ", wanted a 64-bit integer");
  return value;
}

float Value::as_float(std::string_view where) const {
  const std::string& text = get<Number>(data_, *this, where, "a number").text;
  float value = 0.0f;
  MEDUSA_CHECK_ARG(read_float(text, value), where, ": found ", text,
                   ", wanted a number that fits 32-bit floating point");
  return value;
}

const std::string& Value::as_string(std::string_view where) const {
  return get<std::string>(data_, *this, where, "a string");
}

const Value::Array& Value::as_array(std::string_view where) const {
  return get<Array>(data_, *this, where, "an array");
}

const Value::Object& Value::as_object(std::string_view where) const {
  return get<Object>(data_, *this, where, "an object");
}

Value parse(std::string_view text, std::string_view what) { return Parser(text, what).document(); }

const Value* find(const Value::Object& object, std::string_view key) {
  const auto at =
      std::lower_bound(object.begin(), object.end(), key,
                       [](const Member& member, std::string_view k) { return member.key < k; });
  return at != object.end() && at->key == key ? &at->value : nullptr;
}

std::string quote(std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += "\\u00";
      out += kHex[(c >> 4) & 0xF];
      out += kHex[c & 0xF];
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string number(float value) {
  MEDUSA_CHECK_ARG(std::isfinite(value), "JSON has no number for ", value);
  std::string text;
  for (int digits = 6; digits <= std::numeric_limits<float>::max_digits10; ++digits) {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    out.precision(digits);
    out << value;
    text = out.str();
    float back = 0.0f;
    if (read_float(text, back) && back == value) break;
  }
  return text;
}

}  // namespace medusa::json
