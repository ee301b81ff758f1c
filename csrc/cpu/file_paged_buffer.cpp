#include "cpu/file_paged_buffer.h"

#include <unistd.h>

#include <algorithm>
#include <deque>
#include <utility>

#include "cpu/page_file.h"

namespace qlora {
namespace {

class FilePagedBuffer final : public PagedBuffer {
 public:
  FilePagedBuffer(Device device, const PagedBufferOptions& options, std::unique_ptr<PageFile> file)
      : PagedBuffer(device, PagingStrategy::file, options, PagePlace::host),
        file_(std::move(file)),
        states_(static_cast<std::size_t>(page_count()), State::away),
        staying_pages_(page_count()) {
    if (options.resident_bytes && *options.resident_bytes < options.bytes) {
      constexpr std::int64_t max_guests = 3;  // in use, coming, going
      const std::int64_t room = *options.resident_bytes / options.page_bytes;
      max_guest_count_ = std::min(max_guests, room);
      staying_pages_ = room - max_guest_count_;
    }
  }

  std::byte* data() const override { return file_->data(); }

 private:
  /// A page has been asked for and not been used since, is in use, was used and stays, or is being
  /// written out. A guest that is not away takes room.
  enum class State : std::uint8_t { away, asked, in_use, idle, going };

  struct Going {
    std::int64_t page;
    bool was_asked;
  };

  std::byte* do_begin(std::int64_t page, void*) override {
    check_process("PagedBuffer.begin");
    State& state = state_of(page);
    if (state == State::away && is_guest(page)) make_room_for(page);
    if (state == State::going) {
      std::erase_if(going_, [&](const Going& going) { return going.page == page; });
    }
    // Also one that stays: the kernel may have taken its memory.
    if (state == State::asked || state == State::going) {
      note(page, PagePlace::device);
    } else {
      ask(page);
    }
    state = State::in_use;
    const std::int64_t next = page + 1;
    if (next < page_count() && is_askable(next)) ask(next);
    return file_->data() + page_range(page).offset;
  }

  void do_end(std::int64_t page, void*) override {
    check_process("PagedBuffer.end");
    if (!is_guest(page)) {
      state_of(page) = State::idle;
      return;
    }
    send_away(page);
    finish_all_but(1);
  }

  bool do_make_resident(void*, std::int64_t) override {
    check_process("PagedBuffer.make_resident");
    return false;  // work on all of it at once would bring all of it to memory
  }

  void do_join(void*) override {
    check_process("PagedBuffer.join");
    finish_all_but(0);
    keep_error([&] { file_->check_written(); });
    if (error_) throw FileError(*error_);
  }

  void do_prefetch_to_device(std::int64_t first, std::int64_t last, void*) override {
    check_process("PagedBuffer.prefetch_to_device");
    for (std::int64_t page = first; page < last; ++page) {
      if (is_askable(page)) ask(page);
    }
  }

  void do_prefetch_to_host(std::int64_t first, std::int64_t last, void*) override {
    check_process("PagedBuffer.prefetch_to_host");
    // Also one that is away: data() may have been used.
    for (std::int64_t page = first; page < last; ++page) {
      if (state_of(page) != State::going) send_away(page);
    }
  }

  /// The file is the parent's, too: what a child writes there would be the parent's state.
  void check_process(const char* operation) const {
    if (getpid() == owner_) return;
    throw Unsupported(message(operation,
                              ": this process was forked from the one that made the buffer, whose "
                              "file it would write to"));
  }

  bool is_guest(std::int64_t page) const { return page >= staying_pages_; }
  State& state_of(std::int64_t page) { return states_[static_cast<std::size_t>(page)]; }

  /// Whether a page may be asked for ahead of its use, without waiting for another to go.
  bool is_askable(std::int64_t page) {
    const State state = state_of(page);
    if (state == State::away) return !is_guest(page) || guest_count_ < max_guest_count_;
    return state == State::idle;
  }

  void ask(std::int64_t page) {
    set_state(page, State::asked);
    file_->ask(page_range(page));
    note(page, PagePlace::device);
  }

  void send_away(std::int64_t page) {
    going_.push_back({page, state_of(page) != State::away});
    set_state(page, State::going);
    note(page, PagePlace::host);
    keep_error([&] { file_->start_writing(page_range(page)); });
  }

  void finish_all_but(std::size_t count) {
    while (going_.size() > count) {
      const auto [page, was_asked] = going_.front();
      going_.pop_front();
      set_state(page, State::away);
      if (was_asked) file_->await(page_range(page));
      keep_error([&] { file_->drop(page_range(page)); });
    }
  }

  void make_room_for(std::int64_t page) {
    while (guest_count_ >= max_guest_count_) {
      if (going_.empty()) {
        const auto unused =
            std::find(states_.begin() + staying_pages_, states_.end(), State::asked);
        check(unused != states_.end(), "PagedBuffer.begin: page ", page, " has no room, as ",
              max_guest_count_, " pages are in use beside those that stay; end one first");
        send_away(unused - states_.begin());
      }
      finish_all_but(going_.size() - 1);
    }
  }

  void set_state(std::int64_t page, State state) {
    State& known = state_of(page);
    if (is_guest(page)) guest_count_ += (state != State::away) - (known != State::away);
    known = state;
  }

  /// Runs what may find that a page could not be written. The first such error is for `join`, and
  /// each one after it: the kernel tries no page again, and may have dropped it.
  template <typename Function>
  void keep_error(Function&& function) {
    try {
      function();
    } catch (const FileError& error) {
      if (!error_) error_.emplace(error);
    }
  }

  pid_t owner_ = getpid();
  std::unique_ptr<PageFile> file_;
  std::vector<State> states_;
  std::int64_t staying_pages_;
  std::int64_t max_guest_count_ = 0, guest_count_ = 0;
  std::deque<Going> going_;  // in the order in which they ended
  std::optional<FileError> error_;
};

}  // namespace

std::unique_ptr<PagedBuffer> make_file_paged_buffer(Device device,
                                                    const PagedBufferOptions& options) {
  // Before the buffer, whose account of a state that no disk holds would be long.
  auto file = std::make_unique<PageFile>(*options.page_file, options.bytes);
  check(!options.resident_bytes || file->gives_memory_back(), "PagedBuffer: page_file is '",
        *options.page_file,
        "', on a file system in memory, which cannot keep to resident_bytes; "
        "want a directory on a disk, or no resident_bytes");
  return std::make_unique<FilePagedBuffer>(device, options, std::move(file));
}

}  // namespace qlora
