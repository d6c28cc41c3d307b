// Greedy selection, all picks in one launch: one block for each picture, its scores in shared memory.
//
// `keep` times the token with the highest score is picked (equal scores: the lower index), and every token's
// score is multiplied by its factor towards the pick; a pick's own score becomes -inf for good. That is one
// multiplication a score and pick, rounded once, so the picks are those of any other code that does the same
// to the same numbers, index for index. Scores that are no numbers are beaten by none that came before them,
// and never lead outside the arrays.
//
// Threads talk only across the barrier that ends each phase: within one, a thread writes what no other reads.
// tests/stand_ins/greedy_host.h compiles this file for a CPU, where a phase runs its threads in any order.

#include <math.h>

#define THREADS 256  // a power of two; engines/plugins/greedy.py launches as many

#ifndef PHASE
#define PHASE(...)                          \
    {                                       \
        const int thread = threadIdx.x;     \
        __VA_ARGS__                         \
    }                                       \
    __syncthreads();
#endif

// Whether a score beats another one: a higher value, or the same at a lower place.
__device__ static bool beats(float one, int here, float two, int there)
{
    return one > two || (one == two && here < there);
}

// scores [B,count], factors [B,count,count] -> picks [B,keep] in order of picking.
// A block wants (count + 2 * THREADS) * 4 bytes of shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    vtp_greedy(const float* scores, const float* factors, int count, int keep, long long* picks)
{
    extern __shared__ float left[];         // scores as the picks left them; each thread has its own ones
    float* best = left + count;             // of each thread: the highest of its scores,
    int* place = (int*)(best + THREADS);    // and which token that is
    const size_t picture = blockIdx.x;
    scores += picture * count;
    factors += picture * count * count;
    picks += picture * keep;

    PHASE(
        for (int token = thread; token < count; token += THREADS)
            left[token] = scores[token];
    )
    for (int step = 0; step < keep; ++step) {
        PHASE(
            best[thread] = -INFINITY;
            place[thread] = count;  // a thread without tokens beats none
            for (int token = thread; token < count; token += THREADS)
                if (token == thread || left[token] > best[thread]) {
                    best[thread] = left[token];
                    place[thread] = token;
                }
        )
        for (int half = THREADS / 2; half; half /= 2) {
            PHASE(
                const int other = thread + half;
                if (thread < half && beats(best[other], place[other], best[thread], place[thread])) {
                    best[thread] = best[other];
                    place[thread] = place[other];
                }
            )
        }
        PHASE(
            const int pick = place[0];
            const float* row = factors + (size_t)pick * count;
            for (int token = thread; token < count; token += THREADS)
                left[token] = token == pick ? -INFINITY : left[token] * row[token];
            if (thread == 0)
                picks[step] = pick;
        )
    }
}
