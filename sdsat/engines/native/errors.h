// Errors: what the library refuses, and why no exception leaves it.
//
// Every exported function answers with nothing, or with one line that says why it could not be
// done (interface.cpp). Inside, a check that fails throws; guarded() turns what was thrown into
// that line.
#pragma once

struct Refused {
  const char* why;
};

static inline void check(bool holds, const char* why) {
  if (!holds) throw Refused{why};
}

static const char* const OUT_OF_MEMORY = "out of memory";  // bindings.py knows it by these words

// Nothing, or in one line why f could not be done.
template <class F> static const char* guarded(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Refused& refused) {
    return refused.why;
  } catch (...) {
    return OUT_OF_MEMORY;
  }
}
