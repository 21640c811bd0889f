// The tokenizer's part of the Python module.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "bpe/encode.h"
#include "bpe/files.h"
#include "bpe/memory.h"
#include "bpe/split.h"
#include "bpe/train.h"
#include "bpe/utf8.h"
#include "core/error.h"

namespace py = pybind11;

namespace pygpt {
namespace {

// The UTF-8 of a str, whole or in chunks that may be encoded on their own and stay in the
// processor's cache. Python would take several times as long to make it, and keep it with the str
// from then on. A str with lone surrogates has none: it goes through UTF-16, which joins pairs and
// replaces the rest.
class Utf8 {
 public:
  static constexpr size_t kChunk = 1 << 16;  // characters, about
  explicit Utf8(py::handle text, size_t chunk = SIZE_MAX)
      : text_(py::reinterpret_borrow<py::object>(text)), chunk_(chunk) {
    if (!PyUnicode_Check(text.ptr())) {
      throw py::type_error(std::string("argument 'text': '") + Py_TYPE(text.ptr())->tp_name +
                           "' object is not an instance of 'str'");
    }
    left_ = PyUnicode_GET_LENGTH(text.ptr());
  }

  // Goes to the next chunk; false at the end. Needs no GIL.
  bool next() {
    if (!left_) return false;
    const void* const data = PyUnicode_DATA(text_.ptr());
    const size_t done = static_cast<size_t>(PyUnicode_GET_LENGTH(text_.ptr())) - left_;
    if (PyUnicode_IS_ASCII(text_.ptr())) {
      view_ = {static_cast<const char*>(data) + done, left_};
      left_ = 0;
      return true;
    }
    const auto kind = PyUnicode_KIND(text_.ptr());
    if (kind == PyUnicode_1BYTE_KIND   ? make(static_cast<const Py_UCS1*>(data) + done)
        : kind == PyUnicode_2BYTE_KIND ? make(static_cast<const Py_UCS2*>(data) + done)
                                       : make(static_cast<const Py_UCS4*>(data) + done)) {
      return true;
    }
    const py::gil_scoped_acquire acquire;
    const auto rest = py::reinterpret_steal<py::object>(
        PyUnicode_Substring(text_.ptr(), static_cast<Py_ssize_t>(done), PY_SSIZE_T_MAX));
    if (!rest) throw py::error_already_set();
    text_ = rest.attr("encode")("utf-16", "surrogatepass").attr("decode")("utf-16", "replace");
    left_ = PyUnicode_GET_LENGTH(text_.ptr());
    return next();
  }
  std::string_view view() const { return view_; }
  size_t left() const { return left_; }  // characters after this chunk

 private:
  template <class Unit>
  bool make(const Unit* units) {
    const size_t count = chunk_size(units);
    const size_t room = utf8_room<Unit>(count);
    if (room > room_) {
      own_.reset(static_cast<char*>(std::malloc(room)));
      if (!own_) throw std::bad_alloc();
      if (room > 1 << 20) advise_huge(own_.get(), room);
      room_ = room;
    }
    const char* const end = to_utf8(units, count, own_.get());
    if (!end) return false;
    view_ = {own_.get(), static_cast<size_t>(end - own_.get())};
    left_ -= count;
    return true;
  }

  template <class Unit>
  size_t chunk_size(const Unit* units) const {
    for (size_t size = chunk_; size < left_; size *= 2) {
      for (size_t i = size; i > size / 2; --i) {
        if (may_cut(class_of(units[i - 2]), class_of(units[i - 1]), class_of(units[i]))) return i;
      }
    }
    return left_;
  }

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  py::object text_;
  const size_t chunk_;
  size_t left_, room_ = 0;
  std::unique_ptr<char, Free> own_;
  std::string_view view_;
};

// None: no special token; True: all of the vocabulary; otherwise these.
class SpecialChoice {
 public:
  SpecialChoice(const Bpe& bpe, py::handle choice) {
    if (choice.is_none()) return;
    if (choice.ptr() == Py_True) {
      chosen_ = &bpe.specials();
      return;
    }
    for (const auto& [token, id] : choice.cast<std::vector<std::pair<std::string, uint32_t>>>()) {
      own_.add(token, id);
    }
  }
  const Specials& operator*() const { return chosen_ ? *chosen_ : own_; }

 private:
  const Specials* chosen_ = nullptr;
  Specials own_;
};

// Chunks are cut at blanks: no special token may hold one.
size_t chunk_for(const Specials& allowed, const Specials& disallowed) {
  return allowed.any_blank() || disallowed.any_blank() ? SIZE_MAX : Utf8::kChunk;
}

Ids encode(const Bpe& bpe, py::handle text, py::handle allowed, py::handle disallowed) {
  const SpecialChoice allow(bpe, allowed), refuse(bpe, disallowed);
  Utf8 utf8(text, chunk_for(*allow, *refuse));
  Ids ids;
  const py::gil_scoped_release release;
  while (utf8.next()) bpe.encode(utf8.view(), *allow, *refuse, &ids, utf8.left());
  return ids;
}

py::list list_of(const uint32_t* ids, size_t count) {
  auto list = py::reinterpret_steal<py::list>(PyList_New(static_cast<Py_ssize_t>(count)));
  if (!list) throw py::error_already_set();
  // Equal ids are one int: a third of the memory, which costs more than the look-up. The first ids
  // to come are the frequent ones: they keep their places.
  struct Known {
    uint32_t id;
    PyObject* number;
  };
  std::vector<Known> known(count < 256 ? 0 : std::min(std::bit_ceil(count / 8), size_t{1} << 18));
  for (size_t i = 0; i < count; ++i) {
    Known* const place = known.empty() ? nullptr : &known[ids[i] & (known.size() - 1)];
    PyObject* number = nullptr;
    if (place && place->number && place->id == ids[i]) {
      number = place->number;
      Py_INCREF(number);
    } else {
      number = PyLong_FromUnsignedLong(ids[i]);
      if (!number) throw py::error_already_set();
      if (place && !place->number) *place = {ids[i], number};
    }
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), number);
  }
  return list;
}

py::array_t<uint32_t> array_of(Ids ids) {
  const auto size = static_cast<py::ssize_t>(ids.size());
  uint32_t* const data = ids.release();
  return py::array_t<uint32_t>(size, data, py::capsule(data, [](void* p) { std::free(p); }));
}

uint32_t id_of(py::handle value) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();
  const unsigned long long id = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();  // OverflowError for a negative one
  if (id > UINT32_MAX) throw std::overflow_error("out of range integral type conversion attempted");
  return static_cast<uint32_t>(id);
}

template <class Integer>
void append_ids(const py::buffer_info& info, std::vector<uint32_t>& ids) {
  for (py::ssize_t i = 0; i < info.shape[0]; ++i) {
    const auto* at = static_cast<const char*>(info.ptr) + i * info.strides[0];
    const Integer id = *reinterpret_cast<const Integer*>(at);
    if (id < Integer{0}) throw std::overflow_error("can't convert negative int to unsigned");
    if (static_cast<uint64_t>(id) > UINT32_MAX) {
      throw std::overflow_error("out of range integral type conversion attempted");
    }
    ids.push_back(static_cast<uint32_t>(id));
  }
}

// Ids from any sequence of ints; arrays of integers are read without making objects.
std::vector<uint32_t> ids_of(py::handle sequence) {
  std::vector<uint32_t> ids;
  if (PyObject_CheckBuffer(sequence.ptr()) && !PyBytes_Check(sequence.ptr())) {
    const auto info = py::reinterpret_borrow<py::buffer>(sequence).request();
    if (info.ndim == 1 && info.format.size() == 1) {
      ids.reserve(static_cast<size_t>(info.shape[0]));
      const bool is_signed = std::strchr("bhilq", info.format[0]) != nullptr;
      if (std::strchr("bhilqBHILQ", info.format[0])) {
        switch (info.itemsize) {
          case 1:
            is_signed ? append_ids<int8_t>(info, ids) : append_ids<uint8_t>(info, ids);
            return ids;
          case 2:
            is_signed ? append_ids<int16_t>(info, ids) : append_ids<uint16_t>(info, ids);
            return ids;
          case 4:
            is_signed ? append_ids<int32_t>(info, ids) : append_ids<uint32_t>(info, ids);
            return ids;
          case 8:
            is_signed ? append_ids<int64_t>(info, ids) : append_ids<uint64_t>(info, ids);
            return ids;
        }
      }
    }
  }
  const auto fast = py::reinterpret_steal<py::object>(
      PySequence_Fast(sequence.ptr(), "token ids must be a sequence of int"));
  if (!fast) throw py::error_already_set();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(fast.ptr());
  ids.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count && i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i) {
    ids.push_back(id_of(PySequence_Fast_GET_ITEM(fast.ptr(), i)));
  }
  return ids;
}

py::bytes bytes_of(std::string_view s) { return py::bytes(s.data(), s.size()); }

using SpecialIds = std::vector<std::pair<std::string, uint32_t>>;

std::unique_ptr<Bpe> make_bpe(Vocabulary vocabulary, const std::string& pattern,
                              const SpecialIds& special_ids) {
  Specials specials;
  for (const auto& [token, id] : special_ids) {
    specials.add(token, id);
    vocabulary.add_special(token, id);
  }
  std::optional<Pattern> native;
  if (pattern == "gpt2") native = Pattern::kGpt2;
  if (pattern == "cl100k") native = Pattern::kCl100k;
  if (pattern == "o200k") native = Pattern::kO200k;
  return std::make_unique<Bpe>(std::move(vocabulary), native, std::move(specials));
}

std::vector<Token> tokens_of(const std::vector<std::pair<std::string, uint32_t>>& pairs) {
  std::vector<Token> tokens;
  tokens.reserve(pairs.size());
  for (const auto& [bytes, id] : pairs) tokens.push_back({bytes, id});
  return tokens;
}

// Texts that stay alive while threads read them.
struct Texts {
  explicit Texts(const py::iterable& sequence) {
    for (const py::handle text : sequence) {
      Utf8& utf8 = owners.emplace_back(text);
      utf8.next();
      views.push_back(utf8.view());
    }
  }
  std::vector<std::string_view> views;
  std::vector<Utf8> owners;
};

// Encodes texts in parallel in groups of about `kGroup` bytes; ids come out in order, with the
// number of each text's ids.
struct Batch {
  static constexpr size_t kGroup = 1 << 16;
  struct Group {
    size_t begin, end;
    Ids ids;
  };
  Batch(const Bpe& bpe, const std::vector<std::string_view>& texts, const Specials& allowed,
        const Specials& disallowed, int threads)
      : counts(texts.size()) {
    for (size_t i = 0, bytes = kGroup; i < texts.size(); ++i) {
      if (bytes >= kGroup) {
        groups.push_back({i, i, Ids()});
        bytes = 0;
      }
      bytes += texts[i].size() + 16;
      groups.back().end = i + 1;
    }
    run_tasks(groups.size(), threads, [&](size_t task, int) {
      Group& group = groups[task];
      for (size_t i = group.begin; i < group.end; ++i) {
        counts[i] = bpe.encode(texts[i], allowed, disallowed, &group.ids);
      }
    });
  }
  std::vector<Group> groups;
  std::vector<size_t> counts;
};

// The parts lie one behind the other then; threads share the copying.
void append(Ids& all, const std::vector<const Ids*>& parts, int threads) {
  std::vector<size_t> starts;
  size_t total = 0;
  for (const Ids* part : parts) {
    starts.push_back(total);
    total += part->size();
  }
  all.reserve(total);
  run_tasks(parts.size(), threads, [&](size_t task, int) {
    const Ids& part = *parts[task];
    if (part.size())
      std::memcpy(all.end() + starts[task], part.data(), part.size() * sizeof(uint32_t));
  });
  all.set_end(all.end() + total);
}

Ids encode_files(const Bpe& bpe, const std::vector<std::string>& paths, int threads,
                 std::optional<uint32_t> separator) {
  ChunkReader reader(paths, false);
  Ids all;
  for (;;) {
    const std::vector<Chunk> chunks = reader.next();
    if (chunks.empty()) return all;
    std::vector<Ids> parts(chunks.size());
    run_tasks(chunks.size(), threads, [&](size_t task, int) {
      check_utf8(chunks[task]);
      bpe.encode_ordinary(chunks[task].text, &parts[task]);
      if (chunks[task].ends_file && separator) parts[task].push(*separator);
    });
    std::vector<const Ids*> in_order;
    for (const Ids& part : parts) in_order.push_back(&part);
    append(all, in_order, threads);
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals()) throw py::error_already_set();
  }
}

// Counts pieces of chunks or texts, each worker in a table of its own.
class Trainer {
 public:
  // The tables take about `budget` bytes, what spills from them must fit into `memory` bytes.
  Trainer(int threads, size_t budget, size_t memory) : memory_(memory) {
    for (int i = 0; i < threads; ++i) counts_.emplace_back(budget / threads, &spill_);
  }

  void add_texts(const std::string& pattern, const py::sequence& sequence) {
    const Texts texts(sequence);
    std::vector<std::string_view> parts;
    for (std::string_view text : texts.views) {
      for (size_t cut; text.size() > kPart; text.remove_prefix(cut)) {
        cut = last_safe_cut(text.substr(0, kPart));
        if (!cut) break;
        parts.push_back(text.substr(0, cut));
      }
      parts.push_back(text);
    }
    const py::gil_scoped_release release;
    for (size_t from = 0; from < parts.size(); from += kParts) {
      run(std::min(kParts, parts.size() - from), [&](size_t i, PieceCounts& counts) {
        counts.add_text(pattern_named(pattern), parts[from + i]);
      });
    }
  }
  void add_files(const std::string& pattern, const std::vector<std::string>& paths) {
    const py::gil_scoped_release release;
    ChunkReader reader(paths, false);
    for (;;) {
      const std::vector<Chunk> chunks = reader.next();
      if (chunks.empty()) return;
      run(chunks.size(), [&](size_t i, PieceCounts& counts) {
        check_utf8(chunks[i]);
        counts.add_text(pattern_named(pattern), chunks[i].text);
      });
    }
  }
  void add_pieces(const std::vector<std::pair<std::string, uint64_t>>& pieces) {
    for (const auto& [piece, count] : pieces) counts_[0].add_piece(piece, count);
  }
  std::vector<std::pair<uint32_t, uint32_t>> train(size_t merges, uint64_t min_frequency,
                                                   const py::object& progress) {
    const py::gil_scoped_release release;
    for (size_t i = 1; i < counts_.size(); ++i) {
      counts_[0].add_all(counts_[i]);
      counts_[i] = PieceCounts();
    }
    MergeTrainer trainer(memory_);
    const auto hand_over = [&](const PieceCounts& counts) {
      counts.each([&](std::string_view piece, uint64_t count) { trainer.add(piece, count); });
    };
    if (spill_.empty()) {
      hand_over(counts_[0]);
    } else {
      spill_.add(counts_[0]);
      for (size_t partition = 0; partition < PieceSpill::kPartitions; ++partition) {
        PieceCounts counts;
        spill_.read(partition, &counts);
        hand_over(counts);
        check_signals();
      }
    }
    counts_[0] = PieceCounts();
    return trainer.train(merges, min_frequency, [&](size_t done) {
      const py::gil_scoped_acquire gil;
      if (PyErr_CheckSignals()) throw py::error_already_set();
      if (!progress.is_none()) progress(done);
    });
  }
  bool empty() const {
    for (const PieceCounts& counts : counts_) {
      if (!counts.empty()) return false;
    }
    return spill_.empty();
  }

 private:
  static constexpr size_t kPart = 1 << 20, kParts = 64;  // of a text, at a time
  static Pattern pattern_named(const std::string& name) {
    if (name == "gpt2") return Pattern::kGpt2;
    if (name == "cl100k") return Pattern::kCl100k;
    if (name == "o200k") return Pattern::kO200k;
    throw std::invalid_argument("no native pattern '" + name + "'");
  }
  static void check_signals() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals()) throw py::error_already_set();
  }
  template <class Body>
  void run(size_t tasks, const Body& body) {
    run_tasks(tasks, static_cast<int>(counts_.size()),
              [&](size_t task, int worker) { body(task, counts_[static_cast<size_t>(worker)]); });
    check_signals();
  }
  size_t memory_;
  PieceSpill spill_;
  std::vector<PieceCounts> counts_;
};

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const DisallowedSpecial& e) {
    const std::string token = py::repr(py::str(e.what()));
    py::set_error(
        PyExc_ValueError,
        ("Encountered text corresponding to disallowed special token " + token +
         ".\nIf you want this text to be encoded as a special token, pass it to `allowed_special`, "
         "e.g. `allowed_special={" +
         token +
         ", ...}`.\n"
         "If you want this text to be encoded as normal text, disable the check for this token by "
         "passing `disallowed_special=(enc.special_tokens_set - {" +
         token +
         "})`.\n"
         "To disable this check for all special tokens, pass `disallowed_special=()`.\n")
            .c_str());
  } catch (const FileError& e) {
    errno = e.code;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, e.what());
  }
}

}  // namespace

void bind_tokenizer(py::module_& m) {
  py::register_local_exception_translator(&translate);
  py::class_<Trainer>(m, "Trainer")
      .def(py::init<int, size_t, size_t>())
      .def("add_texts", &Trainer::add_texts)
      .def("add_files", &Trainer::add_files)
      .def("add_pieces", &Trainer::add_pieces)
      .def("train", &Trainer::train)
      .def_property_readonly("empty", &Trainer::empty);

  py::class_<Bpe>(m, "Bpe")
      .def(py::init([](const std::vector<std::pair<std::string, uint32_t>>& tokens,
                       const std::optional<std::vector<std::pair<uint32_t, uint32_t>>>& merges,
                       bool whole_pieces, const std::string& pattern, const SpecialIds& specials) {
        Vocabulary vocabulary = merges ? Vocabulary(tokens_of(tokens), *merges, whole_pieces)
                                       : Vocabulary(tokens_of(tokens));
        return make_bpe(std::move(vocabulary), pattern, specials);
      }))
      .def_static(
          "from_tiktoken",
          [](std::string_view file, const std::string& pattern, const SpecialIds& specials) {
            return make_bpe(Vocabulary(parse_tiktoken(file)), pattern, specials);
          })
      .def_static(
          "from_gpt2_merges",
          [](std::string_view file, const std::string& pattern, const SpecialIds& specials) {
            return make_bpe(Vocabulary(parse_gpt2_merges(file)), pattern, specials);
          })
      .def("encode_ordinary",
           [](const Bpe& bpe, py::handle text) {
             Utf8 utf8(text, Utf8::kChunk);
             Ids ids;
             {
               const py::gil_scoped_release release;
               while (utf8.next()) bpe.encode_ordinary(utf8.view(), &ids, utf8.left());
             }
             return list_of(ids.data(), ids.size());
           })
      .def("encode",
           [](const Bpe& bpe, py::handle text, py::handle allowed, py::handle disallowed) {
             const Ids ids = encode(bpe, text, allowed, disallowed);
             return list_of(ids.data(), ids.size());
           })
      .def("encode_to_numpy",
           [](const Bpe& bpe, py::handle text, py::handle allowed, py::handle disallowed) {
             return array_of(encode(bpe, text, allowed, disallowed));
           })
      .def("count",
           [](const Bpe& bpe, py::handle text, py::handle allowed) {
             const SpecialChoice allow(bpe, allowed);
             Utf8 utf8(text, chunk_for(*allow, Specials()));
             const py::gil_scoped_release release;
             size_t count = 0;
             while (utf8.next()) count += bpe.encode(utf8.view(), *allow, Specials(), nullptr);
             return count;
           })
      .def("encode_batch",
           [](const Bpe& bpe, const py::iterable& sequence, py::handle allowed,
              py::handle disallowed, int threads) {
             const Texts texts(sequence);
             const SpecialChoice allow(bpe, allowed), refuse(bpe, disallowed);
             std::optional<Batch> batch;
             {
               const py::gil_scoped_release release;
               batch.emplace(bpe, texts.views, *allow, *refuse, threads);
             }
             py::list lists;
             for (const Batch::Group& group : batch->groups) {
               const uint32_t* at = group.ids.data();
               for (size_t i = group.begin; i < group.end; at += batch->counts[i++]) {
                 lists.append(list_of(at, batch->counts[i]));
               }
             }
             return lists;
           })
      .def("encode_batch_to_numpy",
           [](const Bpe& bpe, const py::iterable& sequence, py::handle allowed,
              py::handle disallowed, int threads) {
             const Texts texts(sequence);
             const SpecialChoice allow(bpe, allowed), refuse(bpe, disallowed);
             Ids all;
             py::array_t<int64_t> offsets(static_cast<py::ssize_t>(texts.views.size()) + 1);
             int64_t* offset = offsets.mutable_data();
             {
               const py::gil_scoped_release release;
               const Batch batch(bpe, texts.views, *allow, *refuse, threads);
               std::vector<const Ids*> in_order;
               for (const Batch::Group& group : batch.groups) in_order.push_back(&group.ids);
               append(all, in_order, threads);
               *offset = 0;
               for (const size_t count : batch.counts) {
                 offset[1] = offset[0] + static_cast<int64_t>(count);
                 ++offset;
               }
             }
             return py::make_tuple(array_of(std::move(all)), offsets);
           })
      .def("encode_files",
           [](const Bpe& bpe, const std::vector<std::string>& paths, int threads,
              std::optional<uint32_t> separator) {
             Ids ids;
             {
               const py::gil_scoped_release release;
               ids = encode_files(bpe, paths, threads, separator);
             }
             return array_of(std::move(ids));
           })
      .def("encode_pieces",
           [](const Bpe& bpe, const std::vector<std::string_view>& pieces) {
             Ids ids;
             {
               const py::gil_scoped_release release;
               for (const std::string_view piece : pieces) bpe.encode_piece(piece, &ids);
             }
             return list_of(ids.data(), ids.size());
           })
      .def("piece_ends",
           [](const Bpe& bpe, std::string_view text) {
             std::vector<size_t> ends;
             const auto* begin = reinterpret_cast<const uint8_t*>(text.data());
             for (const auto *p = begin, *end = p + text.size(); p < end;) {
               p = piece_end(bpe.pattern().value(), p, end);
               ends.push_back(static_cast<size_t>(p - begin));
             }
             return ends;
           })
      .def("decode_bytes",
           [](const Bpe& bpe, py::handle sequence) {
             const std::vector<uint32_t> ids = ids_of(sequence);
             std::string out;
             {
               const py::gil_scoped_release release;
               bpe.decode(ids.data(), ids.size(), &out);
             }
             return bytes_of(out);
           })
      .def("decode_bytes_batch",
           [](const Bpe& bpe, const py::iterable& batch, int threads) {
             std::vector<std::vector<uint32_t>> ids;
             for (const py::handle sequence : batch) ids.push_back(ids_of(sequence));
             std::vector<std::string> decoded(ids.size());
             {
               const py::gil_scoped_release release;
               run_tasks(ids.size(), threads, [&](size_t i, int) {
                 bpe.decode(ids[i].data(), ids[i].size(), &decoded[i]);
               });
             }
             py::list all;
             for (const std::string& bytes : decoded) all.append(bytes_of(bytes));
             return all;
           })
      .def("token_bytes",
           [](const Bpe& bpe, py::handle value) {
             const uint32_t id = id_of(value);
             if (!bpe.vocabulary().has(id)) throw KeyError(std::to_string(id));
             return bytes_of(bpe.vocabulary().bytes(id));
           })
      .def("whole",
           [](const Bpe& bpe, std::string_view piece) -> std::optional<uint32_t> {
             const auto* bytes = reinterpret_cast<const uint8_t*>(piece.data());
             const uint32_t id = bpe.vocabulary().whole(bytes, piece.size());
             if (id == Vocabulary::kNoToken) return std::nullopt;
             return id;
           })
      .def("merges", [](const Bpe& bpe) { return bpe.vocabulary().merges(); })
      .def("all_reachable", [](const Bpe& bpe) { return bpe.vocabulary().all_reachable(); })
      .def("size", [](const Bpe& bpe) { return bpe.vocabulary().size(); })
      .def("has", [](const Bpe& bpe, uint32_t id) { return bpe.vocabulary().has(id); });
}

}  // namespace pygpt
