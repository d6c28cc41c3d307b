// vtp_greedy on the host, for every picture of a batch.
#include "greedy_host.h"
#include "greedy.cu"

#include <algorithm>
#include <random>

// Gives back how many floats beyond a block's shared memory were written; order 0: threads in their order, 1:
// backwards, above: shuffled.
extern "C" int run(
    const float* scores, const float* factors, int batch, int count, int keep, int shuffle, long long* picks)
{
    order.resize(THREADS);
    for (int thread = 0; thread < THREADS; ++thread)
        order[thread] = shuffle == 1 ? THREADS - 1 - thread : thread;
    if (shuffle > 1)
        std::shuffle(order.begin(), order.end(), std::mt19937(shuffle));
    const int used = count + 2 * THREADS;
    std::fill(left, left + (1 << 16), 3.5f);
    for (blockIdx.x = 0; blockIdx.x < batch; ++blockIdx.x)
        vtp_greedy(scores, factors, count, keep, picks);
    return std::count_if(left + used, left + (1 << 16), [](float one) { return one != 3.5f; });
}
