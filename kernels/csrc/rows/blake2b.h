// BLAKE2b (RFC 7693) with a digest of 8 bytes, keyed, with a personalisation: the codes of hashed vocabularies.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>

namespace lazydp::rows {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

class KeyedBlake2b {
 public:
  static constexpr size_t kBlock = 128;

  // Key of 1 to 64 bytes, or none; person of at most 16.
  KeyedBlake2b(std::span<const uint8_t> key, std::span<const uint8_t> person) : keyed_(!key.empty()) {
    if (key.size() > 64 || person.size() > 16)
      throw std::invalid_argument("expected a key of at most 64 bytes and a person of at most 16");
    std::array<uint8_t, 64> parameters{};
    parameters[0] = kDigest;
    parameters[1] = static_cast<uint8_t>(key.size());
    parameters[2] = 1;  // fanout
    parameters[3] = 1;  // depth
    if (!person.empty()) std::memcpy(parameters.data() + 48, person.data(), person.size());
    std::array<uint64_t, 8> words;
    std::memcpy(words.data(), parameters.data(), 64);
    for (size_t i = 0; i < 8; ++i) start_[i] = kInitial[i] ^ words[i];
    if (keyed_) std::memcpy(key_block_.data(), key.data(), key.size());
    after_key_ = start_;
    if (keyed_) compress(after_key_, key_block_.data(), kBlock, false);
  }

  uint64_t operator()(std::span<const uint8_t> text) const {
    // With a key and no text the block of the key is the last one.
    std::array<uint64_t, 8> state = start_;
    if (keyed_ && text.empty()) {
      compress(state, key_block_.data(), kBlock, true);
      return state[0];
    }
    if (keyed_) state = after_key_;
    uint64_t counted = keyed_ ? kBlock : 0;
    size_t done = 0;
    while (text.size() - done > kBlock) {
      counted += kBlock;
      compress(state, text.data() + done, counted, false);
      done += kBlock;
    }
    std::array<uint8_t, kBlock> last{};
    if (text.size() > done) std::memcpy(last.data(), text.data() + done, text.size() - done);
    compress(state, last.data(), counted + (text.size() - done), true);
    return state[0];
  }

 private:
  static constexpr uint8_t kDigest = 8;
  static constexpr std::array<uint64_t, 8> kInitial = {
      0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu, 0xa54ff53a5f1d36f1u,
      0x510e527fade682d1u, 0x9b05688c2b3e6c1fu, 0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u};
  static constexpr uint8_t kSigma[10][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
      {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
      {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
      {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
      {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

  static void compress(std::array<uint64_t, 8>& state, const uint8_t* block, uint64_t counted, bool last) {
    uint64_t m[16];
    std::memcpy(m, block, kBlock);
    uint64_t v[16];
    for (size_t i = 0; i < 8; ++i) v[i] = state[i], v[i + 8] = kInitial[i];
    v[12] ^= counted;
    if (last) v[14] = ~v[14];
    const auto quarter = [&v](int a, int b, int c, int d, uint64_t x, uint64_t y) {
      v[a] += v[b] + x;
      v[d] = std::rotr(v[d] ^ v[a], 32);
      v[c] += v[d];
      v[b] = std::rotr(v[b] ^ v[c], 24);
      v[a] += v[b] + y;
      v[d] = std::rotr(v[d] ^ v[a], 16);
      v[c] += v[d];
      v[b] = std::rotr(v[b] ^ v[c], 63);
    };
#pragma GCC unroll 12
    for (int round = 0; round < 12; ++round) {
      const uint8_t* s = kSigma[round % 10];
      quarter(0, 4, 8, 12, m[s[0]], m[s[1]]);
      quarter(1, 5, 9, 13, m[s[2]], m[s[3]]);
      quarter(2, 6, 10, 14, m[s[4]], m[s[5]]);
      quarter(3, 7, 11, 15, m[s[6]], m[s[7]]);
      quarter(0, 5, 10, 15, m[s[8]], m[s[9]]);
      quarter(1, 6, 11, 12, m[s[10]], m[s[11]]);
      quarter(2, 7, 8, 13, m[s[12]], m[s[13]]);
      quarter(3, 4, 9, 14, m[s[14]], m[s[15]]);
    }
    for (size_t i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
  }

  bool keyed_;
  std::array<uint64_t, 8> start_{};
  std::array<uint64_t, 8> after_key_{};
  std::array<uint8_t, kBlock> key_block_{};
};

}  // namespace lazydp::rows
