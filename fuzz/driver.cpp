// Stands in for libFuzzer under gcc: replays files, then mutates them by seed.
//   target [-runs=N] [-seed=N] FILE_OR_FOLDER...
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

void run(const Input& input) {
  // A copy of exactly this size, so that a read past its end is noticed.
  auto* exact = static_cast<uint8_t*>(std::malloc(input.size() ? input.size() : 1));
  if (!input.empty()) std::memcpy(exact, input.data(), input.size());
  LLVMFuzzerTestOneInput(exact, input.size());
  std::free(exact);
}

Input read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void mutate(Input& input, const std::vector<Input>& corpus, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return n ? random() % n : 0; };
  for (size_t rounds = 1 + below(6); rounds > 0; --rounds) {
    const size_t at = below(input.size() + 1);
    const size_t length = below(std::min<size_t>(input.size() - at, 64) + 1);
    switch (below(6)) {
      case 0:
        if (at < input.size()) input[at] ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        if (at < input.size()) input[at] = static_cast<uint8_t>(random());
        break;
      case 2:
        input.erase(input.begin() + at, input.begin() + at + length);
        break;
      case 3:
        input.insert(input.begin() + at, 1 + below(80), static_cast<uint8_t>(random()));
        break;
      case 4: {  // a part of the input again, elsewhere
        const Input part(input.begin() + at, input.begin() + at + length);
        input.insert(input.begin() + below(input.size() + 1), part.begin(), part.end());
        break;
      }
      default: {  // a part of another input
        const Input& other = corpus[below(corpus.size())];
        const size_t from = below(other.size() + 1);
        const size_t to = from + below(std::min<size_t>(other.size() - from, 256) + 1);
        input.insert(input.begin() + at, other.begin() + from, other.begin() + to);
      }
    }
  }
  if (input.size() > 1 << 14) input.resize(1 << 14);
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t runs = 0, seed = 0;
  std::vector<Input> corpus{{}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("-runs=", 0) == 0) {
      runs = std::stoull(argument.substr(6));
    } else if (argument.rfind("-seed=", 0) == 0) {
      seed = std::stoull(argument.substr(6));
    } else if (std::filesystem::is_directory(argument)) {
      for (const auto& entry : std::filesystem::directory_iterator(argument)) {
        corpus.push_back(read(entry.path()));
      }
    } else {
      corpus.push_back(read(argument));
    }
  }
  for (const Input& input : corpus) run(input);
  for (uint64_t r = 0; r < runs; ++r) {
    std::mt19937_64 random(seed + r);  // run r alone: -seed=(seed + r) -runs=1
    Input input = corpus[random() % corpus.size()];
    mutate(input, corpus, random);
    run(input);
  }
  std::printf("%zu files and %llu mutations, seed %llu\n", corpus.size() - 1,
              static_cast<unsigned long long>(runs), static_cast<unsigned long long>(seed));
}
