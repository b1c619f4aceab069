// Rows with stay[i] first, in their order, the others behind in theirs: row i goes to place `to`,
// which each of its blocks counts by itself. order[to] = i, count = how many stay.
#include "effopt.cuh"

constexpr int THREADS = 256, SPAN = 4096;  // as in the plugin: values of a block

template <class T>
DEVICE void compact_rows(const T* x, const int* stay, int B, int R, T* rows, long long* order,
                         long long* count) {
  int slices = (R - 1) / SPAN + 1, i = BLOCK_X / slices, slice = BLOCK_X % slices;
  float own_all = 0.0f, own_ahead = 0.0f;  // whole numbers below 2^24: exact
  FOR_THREADS(b, B) {
    float one = stay[b] != 0 ? 1.0f : 0.0f;
    own_all += one;
    own_ahead += b < i ? one : 0.0f;
  }
  int all = int(block_sum(own_all)), ahead = int(block_sum(own_ahead));
  int to = stay[i] != 0 ? ahead : all + i - ahead;
  if (slice == 0) {
    FOR_THREADS(once, 1) {
      order[to] = i;
      if (i == 0) *count = all;
    }
  }
  const T* own = x + (long long)i * R;
  T* into = rows + (long long)to * R;
  auto same = [=](int) { return own; };
  if (whole(R, x, rows))
    copy_packs<THREADS, 16 / sizeof(T)>(1, R, slice, slices, into, same);
  else
    copy_packs<THREADS, 1>(1, R, slice, slices, into, same);
}

#define PARAMETERS(T) \
  (const T* x, const int* stay, int B, int R, T* rows, long long* order, long long* count)
ENTRIES(compact_rows, PARAMETERS, x, stay, B, R, rows, order, count)
