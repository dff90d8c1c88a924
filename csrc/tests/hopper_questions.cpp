// Asks a GPU all of hopper_questions.h; `make gpu` compiles it with nvcc and runs it under a time limit, since a wrong
// phase of a barrier hangs:
//
//     nvcc -x cu -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc -Icsrc/tests csrc/tests/hopper_questions.cpp
#include "hopper_questions.h"

#include <cstdio>
#include <cstdlib>

int main() {
  int wrong = 0;
  hopper_questions::ask_all([&](bool right, const std::string& question) {
    std::printf("%s: %s\n", right ? "right" : "WRONG", question.c_str());
    std::fflush(stdout);
    wrong += !right;
  });
  std::printf("%d wrong\n", wrong);
  return wrong ? EXIT_FAILURE : EXIT_SUCCESS;
}
