// parts[b, h, c, n] = sum over rows r of chunk c of weight[b, r] / H p[r, n], where p[r] is the
// softmax of scale q[b, h, r] k^T + bias.
//
// A block takes one head and CHUNK rows, ROWS of them at a time: keys come into shared memory tile
// by tile, whole rows of logits stay there, and nothing but the sum over the rows goes out.
#include "effopt.cuh"

constexpr int CHUNK = 32, ROWS = 8, EACH = 4, LANES = 32, WIDE = 8;
constexpr int FLOATS = 10240, TILE = 4096;  // of shared memory in all, and of keys at least

// Keys [count, D] into rows of `pitch`, 0 behind D; by 16 bytes where all rows begin at one.
template <class T> DEVICE void load_keys(const T* k, int count, int D, int pitch, T* tile) {
  constexpr int many = 16 / sizeof(T);
  if (D % WIDE == 0 && whole(D, k)) {
    int packs = D / many;
    FOR_THREADS(i, count * packs) {
      store(tile + i / packs * pitch + i % packs * many, load(k + i * many));
    }
  } else {
    FOR_THREADS(i, count * pitch) {
      int d = i % pitch;
      tile[i] = d < D ? k[(long long)(i / pitch) * D + d] : rounded<T>(0.0f);
    }
  }
}

// logits[j N] = the product of a key with row j of q, plus bias[j stride]; keys and rows have
// `wide` values. Up to COUNT rows, of which `count` are written.
template <int COUNT, class T>
DEVICE void products(const T* key, const float* q, int wide, int count, const float* bias,
                     long long stride, int N, float* logits) {
  constexpr int many = 16 / sizeof(T);
  float sums[COUNT] = {};
  for (int d = 0; d < wide; d += many) {
    Pack<T> pack = load(key + d);
    for (int j = 0; j < COUNT; j++)
      for (int i = 0; i < many; i++) sums[j] += real(pack.at[i]) * q[j * wide + d + i];
  }
  for (int j = 0; j < COUNT; j++)
    if (j < count) logits[j * N] = sums[j] + bias[j * stride];
}

template <class T>
DEVICE void attention_row(const T* q, const T* k, const float* bias, const float* weight, int H,
                          int R, int D, int G, int N, int Bb, int Hb, int Rb, int Nb,
                          int scale_bits, float* parts) {
  int b = BLOCK_X, h = BLOCK_Y, chunk = BLOCK_Z;
  int wide = (D + WIDE - 1) / WIDE * WIDE, pitch = wide + 16 / int(sizeof(T));
  int ends = CHUNK * (chunk + 1) < R ? CHUNK * (chunk + 1) : R;
  float scale = from_bits(scale_bits);
  const T* queries = q + ((long long)b * H + h) * R * D;
  const T* keys = k + ((long long)b * G + h / (H / G)) * N * D;
  bias += ((long long)(Bb == 1 ? 0 : b) * Hb + (Hb == 1 ? 0 : h)) * Rb * Nb;
  long long stride = Rb == 1 ? 0 : Nb;
  parts += (((long long)b * H + h) * ((R + CHUNK - 1) / CHUNK) + chunk) * N;

  int held = (FLOATS - TILE - 2 * ROWS * LANES - ROWS) / (N + wide);  // at least 1, see `adapt`
  held = held >= ROWS ? ROWS : held >= EACH ? EACH : 1;
  SHARED(float, own);
  float *most = own, *sums = most + ROWS * LANES, *shares = sums + ROWS * LANES;
  float *rows = shares + ROWS, *logits = rows + held * wide;
  int used = 2 * ROWS * LANES + ROWS + held * wide + (held * N + 3) / 4 * 4;
  T* tile = reinterpret_cast<T*>(own + used);
  int tiled = int((FLOATS - used) * sizeof(float) / sizeof(T)) / pitch;

  for (int first = CHUNK * chunk; first < ends; first += held) {
    int count = ends - first < held ? ends - first : held;
    FOR_THREADS(i, held * wide) {
      int r = i / wide, d = i % wide;
      rows[i] = r < count && d < D ? real(queries[(long long)(first + r) * D + d]) * scale : 0.0f;
    }
    for (int start = 0; start < N; start += tiled) {
      int some = N - start < tiled ? N - start : tiled, groups = (count + EACH - 1) / EACH;
      load_keys(keys + (long long)start * D, some, D, pitch, tile);
      BARRIER;
      FOR_THREADS(i, some * groups) {
        int n = i % some, r = i / some * EACH;
        const T* key = tile + n * pitch;
        const float* added = bias + (first + r) * stride + (Nb == 1 ? 0 : start + n);
        float* into = logits + r * N + start + n;
        if (count == 1)
          products<1>(key, rows, wide, 1, added, stride, N, into);
        else
          products<EACH>(key, rows + r * wide, wide, count - r, added, stride, N, into);
      }
      BARRIER;
    }
    FOR_THREADS(i, count * LANES) {
      float value = -3.402823466e38f;
      const float* row = logits + i / LANES * N;
      for (int n = i % LANES; n < N; n += LANES) value = fmaxf(value, row[n]);
      most[i] = value;
    }
    BARRIER;
    FOR_THREADS(i, count * LANES) {
      float value = -3.402823466e38f, sum = 0.0f;
      for (int j = 0; j < LANES; j++) value = fmaxf(value, most[i / LANES * LANES + j]);
      float* row = logits + i / LANES * N;
      for (int n = i % LANES; n < N; n += LANES) sum += row[n] = expf(row[n] - value);
      sums[i] = sum;
    }
    BARRIER;
    FOR_THREADS(r, count) {
      float sum = 0.0f;
      for (int j = 0; j < LANES; j++) sum += sums[r * LANES + j];
      shares[r] = weight[(long long)b * R + first + r] / (sum * H);
    }
    BARRIER;
    FOR_THREADS(n, N) {
      float sum = first == CHUNK * chunk ? 0.0f : parts[n];
      for (int r = 0; r < count; r++) sum += logits[r * N + n] * shares[r];
      parts[n] = sum;
    }
  }
}

#define PARAMETERS(T)                                                                              \
  (const T* q, const T* k, const float* bias, const float* weight, int H, int R, int D, int G,     \
   int N, int Bb, int Hb, int Rb, int Nb, int scale, float* parts)
ENTRIES(attention_row, PARAMETERS, q, k, bias, weight, H, R, D, G, N, Bb, Hb, Rb, Nb, scale, parts)
