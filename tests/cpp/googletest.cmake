# Defines GTest::gtest_main: the system's GoogleTest, else a fetched one, else an error that begins
# "GoogleTest is not available", which tests/python/test_cpp.py turns into a skip.

set(version 1.17.0)
set(sha256 65fab701d9829d38cb77c14acdc431d2108bfdbf8979e40eb8ae567edf10b27c)
set(url https://github.com/google/googletest/releases/download/v${version}/googletest-${version}.tar.gz)

find_package(GTest QUIET)
if(TARGET GTest::gtest_main)
  message(STATUS "qlora_native: GoogleTest of the system")
  return()
endif()

set(archive ${CMAKE_BINARY_DIR}/googletest-${version}.tar.gz)
if(NOT FETCHCONTENT_SOURCE_DIR_GOOGLETEST AND NOT EXISTS ${archive})
  set(how_to_get_it "install it (Debian, Ubuntu: libgtest-dev)")
  if(NOT QLORA_FETCH_GTEST)
    message(FATAL_ERROR
      "GoogleTest is not available: the system has none and QLORA_FETCH_GTEST is OFF; ${how_to_get_it}")
  endif()
  file(DOWNLOAD ${url} ${archive}.part STATUS status INACTIVITY_TIMEOUT 20 TIMEOUT 180)
  list(POP_FRONT status code)
  if(NOT code EQUAL 0)
    file(REMOVE ${archive}.part)
    message(FATAL_ERROR
      "GoogleTest is not available: the system has none and ${url} cannot be downloaded (${status}); ${how_to_get_it}")
  endif()
  file(RENAME ${archive}.part ${archive})
endif()

message(STATUS "qlora_native: GoogleTest ${version}, fetched")
set(INSTALL_GTEST OFF)
set(BUILD_GMOCK OFF)
include(FetchContent)
FetchContent_Declare(googletest URL ${archive} URL_HASH SHA256=${sha256} DOWNLOAD_EXTRACT_TIMESTAMP TRUE)
FetchContent_MakeAvailable(googletest)
