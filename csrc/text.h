// Strings that an operator is given, and the name of a cell.
#pragma once

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "cells.h"

namespace rnnfast {

// As the stable ABI hands one over; whoever is given it takes it, once. Before 2.14, torch's own conversion to std::string loses
// the memory of one in each call.
using Text = StringHandle;

inline std::string take(Text text) {
  size_t length = 0;
  const char* characters = nullptr;
  const bool is_read = torch_string_length(text, &length) == 0 && torch_string_c_str(text, &characters) == 0;
  const std::string taken(is_read ? characters : "", is_read ? length : 0);
  torch_delete_string(text);
  if (!is_read) throw std::runtime_error("torch does not give an operator its string");
  return taken;
}

inline Cell parse_cell(Text text) {
  const std::string name = take(text);
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  if (name == "rnn_relu") return Cell::rnn_relu;
  if (name == "lstm") return Cell::lstm;
  if (name == "gru") return Cell::gru;
  throw std::runtime_error("unknown cell " + name);
}

}  // namespace rnnfast
