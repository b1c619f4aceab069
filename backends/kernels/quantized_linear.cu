// y[m, n] = sum over k of x[m, k] code[n, k] scale[n, k / group] + bias[n], in float32.
//
// Eight codes are one int32, the sum of (code[8 i + j] + 8) 16^j less 2^31. A block computes
// OUTPUTS columns of up to TILE rows: a thread takes 16 bytes, 32 codes, of EACH columns at a time,
// with x from the cache.
#include "effopt.cuh"

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")  // what an index of registers counts must be known
#else
#define UNROLL
#endif

constexpr int THREADS = 128, TILE = 8, EACH = 2;
constexpr int CHUNK = 32, LANES = 8, GROUPS = 4;  // codes of a load; loads and columns of a warp
constexpr int SHARES = THREADS / GROUPS, OUTPUTS = EACH * GROUPS;  // threads of a column; columns
constexpr int PITCH = SHARES + 1;  // no two columns begin in one bank

// The eight codes of a word: nibbles made 0..15 become the last bits of 2^23 + nibble.
DEVICE void unpack(unsigned word, float* codes) {
  word ^= 0x80000000u;
  for (int i = 0; i < 8; i++)
    codes[i] = from_bits(0x4b000000 | int(word >> (4 * i) & 15u)) - 8388616.0f;
}

// The share of one thread in ROWS rows and EACH columns, every GROUPS-th from `column`.
template <int ROWS, class T>
DEVICE void multiply(const T* x, const int* codes, const float* scale, int count, int N, int K,
                     int G, int column, int lane, float (&sums)[ROWS][EACH]) {
  for (int chunk = lane; chunk < K / CHUNK; chunk += SHARES) {
    Pack<int> held[EACH];
    float scales[EACH], parts[ROWS][EACH] = {};
    for (int j = 0; j < EACH; j++) {
      long long n = column + j * GROUPS < N ? column + j * GROUPS : N - 1;
      held[j] = load(codes + n * (K / 8) + chunk * (CHUNK / 8));
      scales[j] = scale[n * G + chunk / (K / CHUNK / G)];
    }
    UNROLL
    for (int word = 0; word < 4; word++) {
      float weights[EACH][8];
      for (int j = 0; j < EACH; j++) unpack(held[j].at[word], weights[j]);
      for (int m = 0; m < ROWS; m++) {
        long long at = (long long)(m < count ? m : count - 1) * K + chunk * CHUNK + word * 8;
        Pack<T, 8> values = load<T, 8>(x + at);
        for (int i = 0; i < 8; i++)
          for (int j = 0; j < EACH; j++) parts[m][j] += real(values.at[i]) * weights[j][i];
      }
    }
    for (int m = 0; m < ROWS; m++)
      for (int j = 0; j < EACH; j++) sums[m][j] += parts[m][j] * scales[j];
  }
}

template <int ROWS, class T>
DEVICE void tile(const T* x, const int* codes, const float* scale, const T* bias, int count, int N,
                 int K, int G, T* y) {
  SHARED(float, shares);
  int first = BLOCK_Y * OUTPUTS;
  FOR_THREADS(i, THREADS) {
    int group = i / LANES % GROUPS, lane = i % LANES + i / (LANES * GROUPS) * LANES;
    float sums[ROWS][EACH] = {};
    multiply<ROWS>(x, codes, scale, count, N, K, G, first + group, lane, sums);
    for (int m = 0; m < ROWS; m++)
      for (int j = 0; j < EACH; j++)
        shares[(m * OUTPUTS + j * GROUPS + group) * PITCH + lane] = sums[m][j];
  }
  BARRIER;
  FOR_THREADS(i, count * OUTPUTS) {
    int n = first + i % OUTPUTS;
    float sum = 0.0f;
    for (int lane = 0; lane < SHARES; lane++) sum += shares[i * PITCH + lane];
    if (n < N) y[(long long)(i / OUTPUTS) * N + n] = rounded<T>(sum + real(bias[n]));
  }
}

template <class T>
DEVICE void quantized_linear(const T* x, const int* codes, const float* scale, const T* bias, int M,
                             int N, int K, int G, T* y) {
  int start = BLOCK_X * TILE, count = M - start < TILE ? M - start : TILE;
  x += (long long)start * K;
  y += (long long)start * N;
  if (count == 1)
    tile<1>(x, codes, scale, bias, count, N, K, G, y);
  else if (count == 2)
    tile<2>(x, codes, scale, bias, count, N, K, G, y);
  else if (count <= 4)
    tile<4>(x, codes, scale, bias, count, N, K, G, y);
  else
    tile<8>(x, codes, scale, bias, count, N, K, G, y);
}

#define PARAMETERS(T)                                                                           \
  (const T* x, const int* codes, const float* scale, const T* bias, int M, int N, int K, int G, \
   T* y)
ENTRIES(quantized_linear, PARAMETERS, x, codes, scale, bias, M, N, K, G, y)
