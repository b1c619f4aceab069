// Rows with stay[i] first, in their order, the others behind in theirs: row i goes to place `to`,
// which each of its blocks counts by itself. order[to] = i, count = how many stay.
#include "effopt.cuh"

constexpr int THREADS = 256, EACH = 16;

template <class T> struct alignas(16) Pack { T at[16 / sizeof(T)]; };

// Copies values at first, first + THREADS, ... below `end`.
template <class T> DEVICE void copy(const T* from, T* into, int first, int end) {
  FOR_THREADS(lane, THREADS) {
    for (long long at = (long long)first + lane; at < end; at += THREADS) into[at] = from[at];
  }
}

template <class T>
DEVICE void compact_rows(const T* x, const int* stay, int B, int R, T* rows, long long* order,
                         long long* count) {
  int i = BLOCK_Y;
  float own_all = 0.0f, own_ahead = 0.0f;  // whole numbers below 2^16: exact
  FOR_THREADS(b, B) {
    float one = stay[b] != 0 ? 1.0f : 0.0f;
    own_all += one;
    own_ahead += b < i ? one : 0.0f;
  }
  int all = int(block_sum(own_all)), ahead = int(block_sum(own_ahead));
  int to = stay[i] != 0 ? ahead : all + i - ahead;
  if (BLOCK_X == 0) {
    FOR_THREADS(once, 1) {
      order[to] = i;
      if (i == 0) *count = all;
    }
  }
  const T* from = x + (long long)i * R;
  T* into = rows + (long long)to * R;
  constexpr int many = 16 / sizeof(T);
  bool wide = R % many == 0 && reinterpret_cast<size_t>(x) % 16 == 0 &&
              reinterpret_cast<size_t>(rows) % 16 == 0;
  int first = BLOCK_X * THREADS * EACH;
  int end = R - first < THREADS * EACH ? R : first + THREADS * EACH;
  if (wide)
    copy(reinterpret_cast<const Pack<T>*>(from), reinterpret_cast<Pack<T>*>(into), first / many,
         end / many);
  else
    copy(from, into, first, end);
}

#define PARAMETERS(T) \
  (const T* x, const int* stay, int B, int R, T* rows, long long* order, long long* count)
ENTRIES(compact_rows, PARAMETERS, x, stay, B, R, rows, order, count)
