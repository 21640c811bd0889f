// C functions for ctypes over csrc/cuda, built against the emulated ptx.cuh beside this file.
#include "cuda/common.cuh"

using namespace pygpt;

// Every chunk of a tile: where two share a place, where the same chunk of eight rows from a
// multiple of eight on, which ldmatrix reads at once, meets a bank twice, and where a step to the
// right does not end at the chunk that it names.
template <int kD>
int64_t tile_errors() {
  constexpr int kRows = 128, kChunks = kD / 8;
  int64_t errors = 0;
  bool taken[kRows * kChunks] = {};
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint32_t offset = tile_offset<kD>(row, chunk);
      const bool inside = offset % 16 == 0 && offset / 16 < kRows * kChunks;
      errors += !inside || taken[offset / 16];
      if (inside) taken[offset / 16] = true;
      for (int other = row / 8 * 8; other < row; ++other) {
        errors += tile_offset<kD>(other, chunk) % 128 == offset % 128;
      }
      for (int from = 0; from < 2; ++from) {
        if ((chunk - from) % 2 || chunk < from) continue;
        errors += step_right(tile_offset<kD>(row, from), chunk - from) != offset;
      }
    }
  }
  return errors;
}

extern "C" {

void emulated_order(int order) { emulated::order = static_cast<emulated::Order>(order); }

void emulated_attention_forward(const CudaAttention* a) { cuda_attention_forward(*a, {}); }

void emulated_attention_backward(const CudaAttention* a, const CudaAttentionGradient* g) {
  cuda_attention_backward(*a, *g, {});
}

int emulated_attention_splits(const CudaAttention* a) { return cuda_attention_splits(*a, {}); }

void emulated_attention_decode(const CudaAttention* a, int splits, float* workspace) {
  cuda_attention_decode(*a, splits, workspace, {});
}

void emulated_sample(const SampleArgs* a, int32_t* keys) { cuda_sample(*a, {}, keys, {}); }

void emulated_cross_entropy(const CudaCrossEntropy* a) { cuda_cross_entropy(*a, {}); }

int64_t emulated_tile_errors() { return tile_errors<64>() + tile_errors<128>(); }

// Every small shape, window, division into documents and length: how often the key and query ranges
// that tiles are skipped and masked by differ from the definition of visibility.
int64_t emulated_range_errors(int most_keys) {
  int64_t errors = 0, checked = 0;
  for (int keys = 1; keys <= most_keys; ++keys) {
    for (int breaks = -1; breaks < 1 << (keys - 1); ++breaks) {  // -1: no documents
      int32_t starts[16] = {};
      for (int j = 1; j < keys; ++j) starts[j] = breaks >> (j - 1) & 1 ? j : starts[j - 1];
      for (int queries = 1; queries <= keys; ++queries) {
        for (int length = -1; length <= keys; ++length) {  // -1: no lengths
          for (int window = 0; window <= 3; ++window) {
            const int32_t lengths = length;
            CudaAttention a{};
            a.queries = queries;
            a.keys = keys;
            a.window = window;
            a.document_starts = breaks < 0 ? nullptr : starts;
            a.kv_lengths = length < 0 ? nullptr : &lengths;
            const Sequence s(a, 0);
            const int n = length < 0 ? keys : length;
            const auto sees = [&](int i, int j) {
              const int position = n - queries + i;
              return j <= position && (!window || j > position - window) &&
                     (breaks < 0 || j >= starts[position]);
            };
            for (int i = 0; i < queries; ++i) {
              for (int j = 0; j < n; ++j) {
                errors += sees(i, j) != (s.first_key(i) <= j && j <= s.last_key(i));
                for (int last = j; last < n; ++last) {  // nobody outside these sees j .. last
                  const bool inside = s.first_query(j) <= i && i < s.end_query(last);
                  bool any = false;
                  for (int m = j; m <= last; ++m) any |= sees(i, m);
                  errors += any && !inside;
                  ++checked;
                }
                for (int rows = 1; i + rows <= queries; ++rows) {
                  bool all = j + 2 <= n;
                  for (int m = i; m < i + rows; ++m) all &= sees(m, j) && sees(m, j + 1);
                  errors += all != s.all_visible(i, rows, j, 2);
                }
              }
            }
          }
        }
      }
    }
  }
  return checked ? errors : -1;
}

}  // extern "C"
