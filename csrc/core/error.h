// Errors that cross into Python. std::invalid_argument becomes ValueError, std::overflow_error
// OverflowError, std::bad_alloc MemoryError; those below become KeyError, pygpt.PygptError and the
// classes of pygpt.errors of the same name. bindings.cpp holds the translation.
#pragma once

#include <stdexcept>
#include <string>

namespace pygpt {

struct KeyError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file, device or state that the user can put right; the message says how.
struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file whose content cannot be used.
struct DataError : UserError {
  using UserError::UserError;
};

// Not enough memory or disk.
struct ResourceError : UserError {
  using UserError::UserError;
};

}  // namespace pygpt
