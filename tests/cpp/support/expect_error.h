// Errors are compared whole: their text is part of the contract (operation, argument, what came,
// what was wanted).
#pragma once

#include <functional>
#include <string>

#include <gtest/gtest.h>

#include "core/check.h"

template <typename Error>
void expect_error(const std::string& message, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "no error, want: " << message;
  } catch (const Error& error) {
    EXPECT_EQ(message, error.what());
  } catch (const std::exception& error) {
    ADD_FAILURE() << "an error of another type: " << error.what();
  }
}

inline void expect_invalid(const std::string& message, const std::function<void()>& call) {
  expect_error<qlora::InvalidArgument>(message, call);
}
