// Text files read in chunks that can be tokenized on their own, and the threads that do it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace pygpt {

// Becomes OSError with this errno and path.
struct FileError : std::runtime_error {
  FileError(int code, std::string path) : std::runtime_error(path), code(code) {}
  int code;
};

struct Chunk {
  std::string text;
  const std::string* path;
  uint64_t offset;  // of text in the file
  bool ends_file;
};

// Throws DataError, naming path and offset, where the text is not UTF-8.
void check_utf8(const Chunk& chunk);

class ChunkReader {
 public:
  // With `whole_files` a file is one chunk.
  ChunkReader(std::vector<std::string> paths, bool whole_files)
      : paths_(std::move(paths)), whole_files_(whole_files) {}

  // Up to about 16 MB of chunks; empty at the end of the last file. A file is cut only where no
  // piece can straddle the cut.
  std::vector<Chunk> next();

 private:
  Chunk read();
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::vector<std::string> paths_;
  bool whole_files_;
  size_t index_ = 0;
  std::unique_ptr<std::FILE, Close> file_;
  uint64_t offset_ = 0;
  std::string rest_;
};

// Runs body(task, worker) for every task, on at most `threads` threads, this one among them. The
// threads live for this call only, so that a fork never meets one. The first exception is rethrown.
void run_tasks(size_t tasks, int threads, const std::function<void(size_t task, int worker)>& body);

}  // namespace pygpt
