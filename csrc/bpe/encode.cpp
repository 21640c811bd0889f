#include "bpe/encode.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "bpe/cache.h"
#include "bpe/memory.h"
#include "bpe/scan.h"
#include "bpe/unicode.h"
#include "core/error.h"

namespace pygpt {
namespace {

const uint8_t* data_of(std::string_view s) { return reinterpret_cast<const uint8_t*>(s.data()); }

}  // namespace

void Ids::reserve(size_t extra) {
  if (capacity_ - size_ >= extra) return;
  const size_t wanted = std::max(size_ + extra, capacity_ + capacity_ / 2);
  const size_t bytes = wanted * sizeof(uint32_t), used = size_ * sizeof(uint32_t);
  void* grown = nullptr;
  if (bytes >= kHugePage && used < bytes / 4) {  // the first of many: from a huge page on
    grown = std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage);
    if (grown && used) std::memcpy(grown, data_, used);
    if (grown) std::free(data_);
  } else {
    grown = std::realloc(data_, bytes);
  }
  if (!grown) throw std::bad_alloc();
  data_ = static_cast<uint32_t*>(grown);
  capacity_ = wanted;
  if (wanted > 1 << 20) advise_huge(data_, bytes);
}

uint32_t* Ids::release() {
  if (!data_ || capacity_ - size_ > capacity_ / 16) {
    if (void* const shrunk = std::realloc(data_, (size_ + 1) * sizeof(uint32_t))) {
      data_ = static_cast<uint32_t*>(shrunk);
    }
  }
  capacity_ = size_ = 0;
  return std::exchange(data_, nullptr);
}

void Specials::add(std::string token, uint32_t id) {
  if (token.empty()) throw std::invalid_argument("a special token may not be empty");
  first_[static_cast<uint8_t>(token[0])] = true;
  const auto longer = [&](const Entry& e) { return e.bytes.size() < token.size(); };
  const auto where = std::find_if(tokens_.begin(), tokens_.end(), longer);
  tokens_.insert(where, {std::move(token), id});
}

Specials::Match Specials::find(std::string_view text, size_t from) const {
  if (tokens_.empty()) return {std::string_view::npos, 0, 0};
  const bool one_first = std::count(first_.begin(), first_.end(), true) == 1;
  for (size_t i = from; i < text.size(); ++i) {
    if (one_first) {
      i = text.find(tokens_[0].bytes[0], i);
      if (i == std::string_view::npos) break;
    } else if (!first_[static_cast<uint8_t>(text[i])]) {
      continue;
    }
    for (const Entry& token : tokens_) {
      if (text.compare(i, token.bytes.size(), token.bytes) == 0) {
        return {i, token.bytes.size(), token.id};
      }
    }
  }
  return {std::string_view::npos, 0, 0};
}

bool Specials::any_blank() const {
  return std::any_of(tokens_.begin(), tokens_.end(), [](const Entry& token) {
    const uint8_t *p = data_of(token.bytes), *const end = p + token.bytes.size();
    while (p < end) {
      const Char c = char_at(p, end);
      if (c.cls == kSpace || c.cls == kNewline) return true;
      p += c.size;
    }
    return false;
  });
}

// Borrows a cache of a Bpe; a new one is made when all are in use. No lock, so that a fork at
// any moment leaves the child able to encode.
class Lease {
 public:
  explicit Lease(const Bpe& bpe) : bpe_(bpe) {
    for (auto& slot : bpe.idle_) {
      if (slot.load(std::memory_order_relaxed) && (cache_ = slot.exchange(nullptr))) return;
    }
    cache_ = new PieceCache(bpe.vocabulary());
  }
  ~Lease() {
    for (auto& slot : bpe_.idle_) {
      PieceCache* empty = nullptr;
      if (slot.compare_exchange_strong(empty, cache_)) return;
    }
    delete cache_;
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  PieceCache* operator->() const { return cache_; }

 private:
  const Bpe& bpe_;
  PieceCache* cache_ = nullptr;
};

Bpe::Bpe(Vocabulary vocabulary, std::optional<Pattern> pattern, Specials specials)
    : vocabulary_(std::move(vocabulary)), pattern_(pattern), specials_(std::move(specials)) {}

Bpe::~Bpe() {
  for (auto& slot : idle_) delete slot.load();
}

size_t Bpe::encode_ordinary(std::string_view text, Ids* out, size_t left) const {
  if (!pattern_) throw std::logic_error("this vocabulary has no native pattern");
  Ids scratch;
  Ids& ids = out ? *out : scratch;
  const Lease cache(*this);
  const size_t before = ids.size();
  size_t counted = 0, done = 0;
  for (PieceScanner pieces(*pattern_, data_of(text), text.size()); pieces.next();) {
    const size_t bytes = pieces.starts()[pieces.pieces()];
    if (ids.room() < bytes + 4) {
      // Room for all, if the rest has as many ids a byte as so far; for many ids in any language
      // where that is no great matter, since pages that are never written are not there.
      const size_t to_come = out ? text.size() - done + left : 0;
      double rate = 1.05 * static_cast<double>(ids.size() - before + 64) / (done + 256);
      if (to_come >> 18 && to_come >> 28 == 0) rate = std::max(rate, 2.0);
      ids.reserve(bytes + 4 + static_cast<size_t>(rate * static_cast<double>(to_come)));
    }
    done += bytes;
    ids.set_end(cache->encode(pieces, ids.end()));
    if (!out) {
      counted += ids.size();
      ids.clear();
    }
  }
  return out ? ids.size() - before : counted;
}

size_t Bpe::encode(std::string_view text, const Specials& allowed, const Specials& disallowed,
                   Ids* out, size_t left) const {
  if (const auto match = disallowed.find(text, 0); match.at != std::string_view::npos) {
    throw DisallowedSpecial(std::string(text.substr(match.at, match.size)));
  }
  size_t count = 0;
  for (size_t from = 0;;) {
    const auto match = allowed.find(text, from);
    const std::string_view stretch = text.substr(from, match.at - from);
    count += encode_ordinary(stretch, out, text.size() - from - stretch.size() + left);
    if (match.at == std::string_view::npos) return count;
    if (out) out->push(match.id);
    ++count;
    from = match.at + match.size;
  }
}

void Bpe::encode_piece(std::string_view piece, Ids* out) const {
  if (piece.empty()) return;
  const Lease cache(*this);
  out->reserve(piece.size() + 4);
  out->set_end(cache->encode(data_of(piece), piece.size(), out->end()));
}

void Bpe::decode(const uint32_t* ids, size_t count, std::string* out) const {
  const Vocabulary::Entry* entries = vocabulary_.entries();
  constexpr size_t kBatch = 1024;
  for (size_t begin = 0; begin < count; begin += kBatch) {
    const size_t end = std::min(count, begin + kBatch);
    size_t used = out->size();
    out->resize(used + kBatch * 16);
    char* to = out->data() + used;
    for (size_t i = begin; i < end; ++i) {
      if (ids[i] >= vocabulary_.size() || entries[ids[i]].size == 0) {
        throw KeyError("Invalid token for decoding: " + std::to_string(ids[i]));
      }
      const Vocabulary::Entry& entry = entries[ids[i]];
      if (entry.size == Vocabulary::kLong) {
        const std::string_view bytes = vocabulary_.bytes(ids[i]);
        used = to - out->data();
        out->resize(used + bytes.size() + kBatch * 16);
        std::memcpy(out->data() + used, bytes.data(), bytes.size());
        to = out->data() + used + bytes.size();
      } else {
        std::memcpy(to, &entry, 16);
        to += entry.size;
      }
    }
    out->resize(to - out->data());
  }
}

}  // namespace pygpt
