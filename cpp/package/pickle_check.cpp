#include "package/pickle_check.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "moecalc/package_file.h"
#include "moecalc/text.h"

namespace moecalc {

bool is_known_code(std::string_view name) {
  for (const std::string_view prefix :
       {"__torch__.moecalc.nn.", "__torch__.torch.nn.modules.container.", "__torch__.torch.nn.functional."}) {
    if (name.substr(0, prefix.size()) == prefix && name.size() > prefix.size()) return true;
  }
  return false;
}

namespace {

constexpr size_t max_text = 4096;
constexpr size_t max_values = 1 << 22;
constexpr size_t max_dimensions = 8;

enum class Kind {
  mark,
  none,
  boolean,
  integer,
  real,
  text,
  global,
  storage,
  tensor,
  tuple,
  list,
  dict,
  object
};

struct Value {
  Kind kind = Kind::none;
  int64_t number = 0;  // integer; elements of a storage; depth of a tuple
  std::string_view text;
  std::vector<std::shared_ptr<Value>> items;
  bool built = false;  // an object that has its state
};
using Pointer = std::shared_ptr<Value>;

int64_t item_size(std::string_view storage) {
  if (storage == "torch FloatStorage") return 4;
  if (storage == "torch DoubleStorage" || storage == "torch LongStorage") return 8;
  if (storage == "torch BoolStorage") return 1;
  return 0;
}

/// Lists of a package's module: the elements.
bool is_known_tag(std::string_view tag) { return tag == "List[str]" || tag == "List[int]"; }

class Reader {
 public:
  Reader(const PackageFile& file, std::string name, std::string folder)
      : records_(file.records()),
        name_(std::move(name)),
        folder_(std::move(folder)),
        content_(file.record(name_)),
        bytes_(content_) {}

  void run() {
    if (next() != 0x80 || next() != 2) refuse("a protocol other than 2");
    for (;;) {
      const unsigned char opcode = next();
      if (opcode == '.') break;
      step(opcode);
      if (++n_values_ > max_values) refuse("more values than any model has");
    }
    if (position_ != bytes_.size() || stack_.size() != 1) refuse("bytes behind its end");
    const Pointer root = pop();
    if (root->kind == Kind::tuple) {
      for (const Pointer& item : root->items) check_plain(*item);
    } else if (root->kind != Kind::object || !root->built) {
      refuse("no module in it");
    }
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Error("damaged or edited file (record `" + name_ + "`: " + what +
                "): copy it again or package the checkpoint again");
  }

  unsigned char next() {
    if (position_ >= bytes_.size()) refuse("cut short");
    return static_cast<unsigned char>(bytes_[position_++]);
  }

  std::string_view take(size_t n) {
    if (n > bytes_.size() - position_) refuse("cut short");
    const std::string_view part = bytes_.substr(position_, n);
    position_ += n;
    return part;
  }

  uint64_t little_endian(size_t n) {
    uint64_t value = 0;
    const std::string_view part = take(n);
    for (size_t i = n; i-- > 0;) value = value << 8 | static_cast<unsigned char>(part[i]);
    return value;
  }

  std::string_view line() {
    const size_t end = bytes_.find('\n', position_);
    if (end == std::string_view::npos || end - position_ > max_text) refuse("cut short");
    const std::string_view part = bytes_.substr(position_, end - position_);
    position_ = end + 1;
    return part;
  }

  void push(Kind kind, int64_t number = 0, std::string_view text = {}, std::vector<Pointer> items = {}) {
    auto value = std::make_shared<Value>();
    value->kind = kind;
    value->number = number;
    value->text = text;
    value->items = std::move(items);
    stack_.push_back(std::move(value));
  }

  Pointer pop() {
    if (stack_.empty()) refuse("a value too few");
    Pointer value = std::move(stack_.back());
    stack_.pop_back();
    return value;
  }

  Value& top(Kind kind, const char* what) {
    if (stack_.empty() || stack_.back()->kind != kind) refuse(what);
    return *stack_.back();
  }

  std::vector<Pointer> pop_to_mark() {
    std::vector<Pointer> items;
    for (Pointer value = pop(); value->kind != Kind::mark; value = pop()) items.push_back(std::move(value));
    return {items.rbegin(), items.rend()};
  }

  /// What a module may have as an attribute, and a list as an element.
  void check_plain(const Value& value) const {
    switch (value.kind) {
      case Kind::mark:
      case Kind::global:
      case Kind::storage:
      case Kind::dict:
      case Kind::tuple:
        refuse("an attribute of an unexpected type");
      case Kind::object:
        if (!value.built) refuse("a module without attributes");
        break;
      default:
        break;
    }
  }

  void step(unsigned char opcode) {
    switch (opcode) {
      case 'c': {
        const std::string_view module = line();
        const std::string_view name = line();
        return read_global(module, name);
      }
      case 'q':
        return memorize(little_endian(1));
      case 'r':
        return memorize(little_endian(4));
      case 'h':
        return recall(little_endian(1));
      case 'j':
        return recall(little_endian(4));
      case '(':
        return push(Kind::mark);
      case 'N':
        return push(Kind::none);
      case 0x88:
      case 0x89:
        return push(Kind::boolean, opcode == 0x88 ? 1 : 0);
      case 'K':
        return push(Kind::integer, static_cast<int64_t>(little_endian(1)));
      case 'M':
        return push(Kind::integer, static_cast<int64_t>(little_endian(2)));
      case 'J':
        return push(Kind::integer, static_cast<int32_t>(little_endian(4)));
      case 0x8a:
        if (next() != 8) refuse("an integer of another length than 8 bytes");
        return push(Kind::integer, static_cast<int64_t>(little_endian(8)));
      case 'G':
        take(8);
        return push(Kind::real);
      case 'X': {
        const uint64_t size = little_endian(4);
        if (size > max_text) refuse("a text of " + std::to_string(size) + " bytes");
        return push(Kind::text, 0, take(size));
      }
      case ')':
        return push(Kind::tuple);
      case ']':
        return push(Kind::list);
      case '}':
        return push(Kind::dict);
      case 't':
        return push_tuple(pop_to_mark());
      case 0x85:
      case 0x86:
      case 0x87: {
        std::vector<Pointer> items(opcode - 0x84U);
        for (size_t i = items.size(); i-- > 0;) items[i] = pop();
        return push_tuple(std::move(items));
      }
      case 'a': {
        Pointer item = pop();
        return append({std::move(item)});
      }
      case 'e':
        return append(pop_to_mark());
      case 's': {
        Pointer value = pop();
        Pointer key = pop();
        return set_items({std::move(key), std::move(value)});
      }
      case 'u':
        return set_items(pop_to_mark());
      case 'Q':
        return read_storage();
      case 0x81:
        return make_object();
      case 'R':
        return reduce();
      case 'b':
        return build();
      default:
        refuse("operation " + std::to_string(opcode) + ", which no package has");
    }
  }

  void read_global(std::string_view module, std::string_view name) {
    const std::string full = std::string(module) + " " + std::string(name);
    const bool known = full == "torch._utils _rebuild_tensor_v2" || full == "collections OrderedDict" ||
                       full == "torch.jit._pickle restore_type_tag" || item_size(full) > 0 ||
                       is_known_code(std::string(module) + "." + std::string(name));
    if (!known) refuse("`" + printable(full, 80) + "`, which no package has");
    push(Kind::global, 0, *names_.insert(full).first);
  }

  /// Ids count up, as torch writes them: readers do not agree on what anything else means.
  void memorize(uint64_t id) {
    if (stack_.empty() || id != memo_.size()) refuse("memory out of order");
    memo_.push_back(stack_.back());
  }

  void recall(uint64_t id) {
    if (id >= memo_.size()) refuse("memory out of order");
    const Kind kind = memo_[id]->kind;
    // a list, or a module before it has its attributes, could come to contain itself
    if (!(kind == Kind::object && memo_[id]->built) && kind != Kind::text && kind != Kind::global &&
        kind != Kind::storage && kind != Kind::tensor) {
      refuse("one value in two places");
    }
    stack_.push_back(memo_[id]);
  }

  void push_tuple(std::vector<Pointer> items) {
    int64_t depth = 1;
    for (const Pointer& item : items) {
      if (item->kind == Kind::mark || item->kind == Kind::object) refuse("a bad tuple");
      if (item->kind == Kind::tuple) depth = std::max(depth, item->number + 1);
    }
    if (depth > 4) refuse("a bad tuple");
    push(Kind::tuple, depth, {}, std::move(items));
  }

  void append(std::vector<Pointer> items) {
    top(Kind::list, "elements without a list");
    for (const Pointer& item : items) {
      if (item->kind != Kind::text && item->kind != Kind::integer) refuse("a list of an unexpected type");
    }
  }

  void set_items(const std::vector<Pointer>& items) {
    top(Kind::dict, "attributes without a module");
    std::set<std::string_view> keys;
    if (items.size() % 2 != 0) refuse("an attribute without a value");
    for (size_t i = 0; i < items.size(); i += 2) {
      if (items[i]->kind != Kind::text) refuse("an attribute without a name");
      if (!keys.insert(items[i]->text).second) refuse("an attribute that is there twice");
      check_plain(*items[i + 1]);
    }
  }

  /// ('storage', type, key, 'cpu', number of elements)
  void read_storage() {
    const Pointer tuple = pop();
    const auto& items = tuple->items;
    if (tuple->kind != Kind::tuple || items.size() != 5 || items[0]->kind != Kind::text ||
        items[0]->text != "storage" || items[1]->kind != Kind::global || items[2]->kind != Kind::text ||
        items[3]->kind != Kind::text || items[3]->text != "cpu" || items[4]->kind != Kind::integer) {
      refuse("a bad storage");
    }
    const int64_t size = item_size(items[1]->text);
    const int64_t n_number = items[4]->number;
    const std::string record = folder_ + "/" + std::string(items[2]->text);
    const auto found = records_.find(record);
    if (size == 0 || n_number < 0) refuse("a bad storage");
    if (found == records_.end()) refuse("no record `" + printable(record, 80) + "`, which it names");
    const auto available = static_cast<int64_t>(found->second.size);
    if (available % size != 0 || available / size != n_number) {
      refuse("expected " + std::to_string(n_number) + " numbers of " + std::to_string(size) + " bytes in `" +
             record + "`, got " + std::to_string(available) + " bytes");
    }
    push(Kind::storage, n_number);
  }

  std::vector<int64_t> integers(const Value& tuple) const {
    if (tuple.kind != Kind::tuple || tuple.items.size() > max_dimensions) refuse("a bad tensor");
    std::vector<int64_t> values;
    for (const Pointer& item : tuple.items) {
      if (item->kind != Kind::integer || item->number < 0) refuse("a bad tensor");
      values.push_back(item->number);
    }
    return values;
  }

  /// (storage, offset, size, stride, requires_grad, hooks)
  void make_tensor(const Value& arguments) {
    const auto& items = arguments.items;
    if (items.size() != 6 || items[0]->kind != Kind::storage || items[1]->kind != Kind::integer ||
        items[1]->number < 0 || items[4]->kind != Kind::boolean || items[5]->kind != Kind::dict) {
      refuse("a bad tensor");
    }
    const int64_t n_number = items[0]->number;
    const std::vector<int64_t> size = integers(*items[2]);
    const std::vector<int64_t> stride = integers(*items[3]);
    if (size.size() != stride.size()) refuse("a bad tensor");
    int64_t last = items[1]->number;
    int64_t count = 1;
    for (size_t d = 0; d < size.size(); ++d) {
      int64_t span = 0;
      if (__builtin_mul_overflow(count, size[d], &count) || count > n_number)
        refuse("a tensor beyond its storage");
      if (size[d] > 0 && (__builtin_mul_overflow(size[d] - 1, stride[d], &span) ||
                          __builtin_add_overflow(last, span, &last))) {
        refuse("a tensor beyond its storage");
      }
    }
    if (count > n_number || (count > 0 && last >= n_number) || items[1]->number > n_number)
      refuse("a tensor beyond its storage");
    push(Kind::tensor);
  }

  void make_object() {
    const Pointer arguments = pop();
    const Pointer type = pop();
    if (type->kind != Kind::global || type->text.substr(0, 9) != "__torch__" ||
        arguments->kind != Kind::tuple || !arguments->items.empty()) {
      refuse("a bad module");
    }
    push(Kind::object);
  }

  void reduce() {
    const Pointer arguments = pop();
    const Pointer function = pop();
    if (function->kind != Kind::global || arguments->kind != Kind::tuple) refuse("a bad call");
    if (function->text == "torch._utils _rebuild_tensor_v2") return make_tensor(*arguments);
    const auto& items = arguments->items;
    if (function->text == "collections OrderedDict" && items.empty()) return push(Kind::dict);
    if (function->text == "torch.jit._pickle restore_type_tag" && items.size() == 2 &&
        items[0]->kind == Kind::list && items[1]->kind == Kind::text && is_known_tag(items[1]->text)) {
      stack_.push_back(items[0]);
      return;
    }
    refuse("a call of `" + printable(function->text, 80) + "` that no package has");
  }

  void build() {
    const Pointer state = pop();
    Value& object = top(Kind::object, "attributes without a module");
    if (state->kind != Kind::dict || object.built) refuse("a bad module");
    object.built = true;
  }

  const Records& records_;
  std::string name_;
  std::string folder_;
  std::string content_;
  std::string_view bytes_;  // content_
  size_t position_ = 0;
  size_t n_values_ = 0;
  std::vector<Pointer> stack_;
  std::vector<Pointer> memo_;
  std::set<std::string> names_;  // of globals; nodes keep their place
};

}  // namespace

void check_pickle(const PackageFile& file, const std::string& name, const std::string& folder) {
  if (file.records().count(name) == 0) {
    throw Error("not a moecalc package: it has no record `" + name + "`");
  }
  Reader(file, name, folder).run();
}

}  // namespace moecalc
