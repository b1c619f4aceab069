// The row of each kept token, and for one that has merged into another, the row of that.
#include "effopt.cuh"

template <class T>
DEVICE void group_tokens(
    const T*, const long long* kept, const long long* source, const long long* target, int N,
    int K, int R, long long* group) {
  const long long sample = BLOCK_X;
  kept += sample * K, source += sample * R, target += sample * R, group += sample * N;
  FOR_THREADS(place, N) group[place] = 0;
  BARRIER;
  FOR_THREADS(row, K) group[kept[row]] = row;
  BARRIER;
  FOR_THREADS(pair, R) group[source[pair]] = group[target[pair]];
}

#define PARAMETERS(T)                                                                            \
  (const T* x, const long long* kept, const long long* source, const long long* target, int N,   \
   int K, int R, long long* group)
ENTRIES(group_tokens, PARAMETERS, x, kept, source, target, N, K, R, group)
