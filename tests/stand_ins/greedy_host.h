// Compiles engines/plugins/greedy.cu for the host: a phase runs its threads one after another, in an order
// that the caller chooses. A kernel whose threads meddle with each other within a phase would show it there.
#pragma once
#include <cstddef>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(threads)

struct Index {
    int x;
};
static Index blockIdx;
static std::vector<int> order;  // of the threads in every phase
static float left[1 << 16];     // what a block may have of shared memory, and more

#define PHASE(...)             \
    for (const int thread : order) { \
        __VA_ARGS__            \
    }
