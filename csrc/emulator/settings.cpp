#include "emulator/settings.h"

#include <cstdlib>
#include <mutex>
#include <stdexcept>

namespace emulator {
namespace {

std::string value_or(const char* variable, const char* otherwise) {
  const char* value = std::getenv(variable);
  return value ? value : otherwise;
}

struct Current {
  std::mutex mutex;
  Settings settings;

  Current() {
    settings.order = order_named(value_or("PETL_EMULATOR_ORDER", "forward"));
    settings.copies = copies_named(value_or("PETL_EMULATOR_COPIES", "lazy"));
  }
};

Current& current() {
  static Current current;
  return current;
}

}  // namespace

Settings settings() {
  const std::lock_guard<std::mutex> lock(current().mutex);
  return current().settings;
}

void configure(const Settings& settings) {
  const std::lock_guard<std::mutex> lock(current().mutex);
  current().settings = settings;
}

const char* name_of(Order order) { return order == Order::forward ? "forward" : "reverse"; }

const char* name_of(Copies copies) { return copies == Copies::lazy ? "lazy" : "eager"; }

Order order_named(const std::string& name) {
  for (const Order order : {Order::forward, Order::reverse}) {
    if (name == name_of(order)) return order;
  }
  throw std::invalid_argument("the emulator's order must be forward or reverse, not " + name);
}

Copies copies_named(const std::string& name) {
  for (const Copies copies : {Copies::lazy, Copies::eager}) {
    if (name == name_of(copies)) return copies;
  }
  throw std::invalid_argument("the emulator's copies must be lazy or eager, not " + name);
}

}  // namespace emulator
