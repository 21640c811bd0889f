#include "bpe/files.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <mutex>
#include <thread>

#include "bpe/encode.h"
#include "bpe/unicode.h"
#include "core/error.h"

namespace pygpt {
namespace {

constexpr size_t kChunk = 1 << 20;
constexpr size_t kBatch = 16 << 20;

}  // namespace

void check_utf8(const Chunk& chunk) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(chunk.text.data());
  const size_t valid = valid_utf8_prefix(bytes, chunk.text.size());
  if (valid == chunk.text.size()) return;
  throw DataError(*chunk.path + ": not UTF-8 text at byte " + std::to_string(chunk.offset + valid) +
                  "; convert the file to UTF-8");
}

std::vector<Chunk> ChunkReader::next() {
  std::vector<Chunk> chunks;
  for (size_t bytes = 0; bytes < kBatch && index_ < paths_.size();) {
    chunks.push_back(read());
    bytes += chunks.back().text.size() + 4096;  // an empty file counts a little too
  }
  return chunks;
}

Chunk ChunkReader::read() {
  const std::string& path = paths_[index_];
  if (!file_) {
    file_.reset(std::fopen(path.c_str(), "rb"));
    if (!file_) throw FileError(errno, path);
  }
  Chunk chunk{std::move(rest_), &path, offset_, false};
  rest_.clear();
  for (;;) {
    const size_t had = chunk.text.size();
    chunk.text.resize(had + kChunk);
    const size_t got = std::fread(chunk.text.data() + had, 1, kChunk, file_.get());
    chunk.text.resize(had + got);
    if (std::ferror(file_.get())) throw FileError(errno, path);
    if (got < kChunk) {
      chunk.ends_file = true;
      file_.reset();
      ++index_;
      offset_ = 0;
      return chunk;
    }
    if (whole_files_) continue;
    const size_t cut = last_safe_cut({chunk.text.data() + had, got});
    if (!cut) continue;
    rest_.assign(chunk.text, had + cut);
    chunk.text.resize(had + cut);
    offset_ += chunk.text.size();
    return chunk;
  }
}

void run_tasks(size_t tasks, int threads,
               const std::function<void(size_t task, int worker)>& body) {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&](int worker) {
    try {
      for (size_t task; (task = next.fetch_add(1)) < tasks;) body(task, worker);
    } catch (...) {
      next = tasks;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  const int workers = static_cast<int>(std::min<size_t>(std::max(threads, 1), tasks));
  for (int w = 1; w < workers; ++w) {
    try {
      others.emplace_back(work, w);
    } catch (const std::system_error&) {  // no more threads to be had: fewer do the work
      break;
    }
  }
  work(0);
  for (std::thread& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace pygpt
