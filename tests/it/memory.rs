//! The allocator: blocks are aligned, zeroed on request, exclusive to their owner, and the kept ones are bounded.

#![cfg(target_os = "linux")]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and says what it did not see"
)]
#![expect(unsafe_code, reason = "an allocator's interface is unsafe")]

use std::alloc::{GlobalAlloc, Layout};
use std::io::Write;

use sdxl_worker::allocator::{Allocator, HUGE, LARGE, Usage, map_file, populate};
use sdxl_worker::units::Bytes;

const MIB: usize = 1 << 20;
/// A limit above what any test keeps.
const AMPLE: usize = 1 << 30;

/// A block of one allocator.
struct Memory<'a> {
    from: &'a Allocator,
    start: *mut u8,
    layout: Layout,
}

// SAFETY: it is the only one that has the memory.
unsafe impl Send for Memory<'_> {}

impl<'a> Memory<'a> {
    fn new(from: &'a Allocator, size: usize) -> Self {
        Self::aligned(from, size, 8, false)
    }

    fn zeroed(from: &'a Allocator, size: usize) -> Self {
        Self::aligned(from, size, 8, true)
    }

    #[track_caller]
    fn aligned(from: &'a Allocator, size: usize, align: usize, zeroed: bool) -> Self {
        let layout = Layout::from_size_align(size, align).unwrap();
        // SAFETY: no size here is zero.
        let start = unsafe { if zeroed { from.alloc_zeroed(layout) } else { from.alloc(layout) } };
        assert!(!start.is_null(), "no memory for {layout:?}");
        Self { from, start, layout }
    }

    fn resize(&mut self, size: usize) {
        // SAFETY: the memory is of this allocator and layout, and no size here is zero.
        self.start = unsafe { self.from.realloc(self.start, self.layout, size) };
        assert!(!self.start.is_null(), "no memory for {size} bytes");
        self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
    }

    /// The block must have been zeroed or filled.
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocator gave this many bytes, and they have been written.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }

    fn fill(&mut self, value: u8) {
        // SAFETY: the allocator gave this many bytes.
        unsafe { self.start.write_bytes(value, self.layout.size()) };
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        // SAFETY: the memory is of this allocator and layout, and is used no more.
        unsafe { self.from.dealloc(self.start, self.layout) };
    }
}

fn sizes() -> Vec<usize> {
    let around = |size: usize| [size - 1, size, size + 1];
    [LARGE, 2 * MIB, 3 * MIB + 128 * 1024, 4 * MIB, 17 * MIB, 33 * MIB].into_iter().flat_map(around).collect()
}

#[test]
fn large_blocks_are_aligned_to_huge_pages_and_others_as_requested() {
    let allocator = Allocator::new(AMPLE);
    for size in sizes() {
        for align in [1, 64, 4096, HUGE, 4 * HUGE] {
            let mut memory = Memory::aligned(&allocator, size, align, true);
            let wanted = if size >= LARGE { align.max(HUGE) } else { align };
            assert_eq!(memory.start.addr() % wanted, 0, "{size} bytes aligned to {align}");
            let last = memory.bytes().last_mut().unwrap();
            *last = 1;
        }
    }
    allocator.release();
    assert_eq!(allocator.usage(), Usage::default());
}

#[test]
fn reused_zeroed_memory_is_zero() {
    let allocator = Allocator::new(AMPLE);
    for size in sizes() {
        let mut first = Memory::new(&allocator, size);
        first.fill(0xff);
        let place = first.start;
        drop(first);
        let mut second = Memory::zeroed(&allocator, size);
        if size >= LARGE {
            assert_eq!(second.start, place, "{size} bytes were not reused");
        }
        assert!(second.bytes().iter().all(|&byte| byte == 0), "{size} bytes");
    }
    allocator.release();
}

#[test]
fn resized_memory_keeps_its_contents() {
    let allocator = Allocator::new(AMPLE);
    let sizes = [1000, LARGE - 1, LARGE, LARGE + 1, 3 * MIB, 40 * MIB, 41 * MIB, 5 * MIB, 5 * MIB - 9, 2 * MIB, 10];
    let mut memory = Memory::zeroed(&allocator, sizes[0]);
    for (step, pair) in sizes.windows(2).enumerate() {
        let value = |at: usize| (at * 31 + at / 251 + step) as u8;
        memory.bytes().iter_mut().enumerate().for_each(|(at, byte)| *byte = value(at));
        memory.resize(pair[1]);
        let kept = pair[0].min(pair[1]);
        let wrong = memory.bytes()[..kept].iter().enumerate().position(|(at, byte)| *byte != value(at));
        assert_eq!(wrong, None, "{} to {} bytes", pair[0], pair[1]);
        memory.fill(7);
    }
    drop(memory);
    allocator.release();
    assert_eq!(allocator.usage(), Usage::default());
}

#[test]
fn threads_never_share_a_block() {
    let allocator = Allocator::new(64 * MIB);
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let allocator = &allocator;
            scope.spawn(move || {
                let mut held: Vec<(u8, Memory)> = Vec::new();
                for round in 0..200_usize {
                    let mark = thread.wrapping_mul(29).wrapping_add(round as u8);
                    let size = LARGE + (round * 7919 + usize::from(thread) * 104_729) % (3 * MIB);
                    let memory = Memory::new(allocator, size);
                    // Both ends of every page identify the last writer.
                    for at in (0..size).step_by(4096).flat_map(|at| [at, (at + 4095).min(size - 1)]) {
                        // SAFETY: the place is within the block.
                        unsafe { memory.start.add(at).write(mark) };
                    }
                    held.push((mark, memory));
                    if held.len() > 3 {
                        let (mark, memory) = held.swap_remove(round % 3);
                        let size = memory.layout.size();
                        for at in (0..size).step_by(4096).flat_map(|at| [at, (at + 4095).min(size - 1)]) {
                            // SAFETY: the place is within the block, and was written above.
                            assert_eq!(unsafe { memory.start.add(at).read() }, mark, "byte {at} of {size}");
                        }
                    }
                }
            });
        }
    });
    let usage = allocator.usage();
    assert_eq!(usage.live, Bytes(0));
    assert!(usage.cached <= Bytes(64 * Bytes::MIB) && usage.cached <= usage.peak, "{usage:?}");
    allocator.release();
}

#[test]
fn kept_blocks_never_exceed_the_limit() {
    let allocator = Allocator::new(20 * MIB);
    let held: Vec<Memory> = (0..10).map(|_| Memory::new(&allocator, 4 * MIB)).collect();
    let usage = Usage { live: Bytes(40 * Bytes::MIB), peak: Bytes(40 * Bytes::MIB), ..Usage::default() };
    assert_eq!(allocator.usage(), usage);
    drop(held);
    assert_eq!(allocator.usage().cached, Bytes(20 * Bytes::MIB));
    drop(Memory::new(&allocator, 24 * MIB));
    assert!(allocator.usage().cached <= Bytes(20 * Bytes::MIB), "{:?}", allocator.usage());
    for _ in 0..2000 {
        drop(Memory::new(&allocator, LARGE));
    }
    allocator.release();
    assert_eq!(allocator.usage(), Usage::default());
}

#[test]
fn kept_blocks_never_raise_the_peak() {
    let allocator = Allocator::new(AMPLE);
    let mut held: Vec<Memory> = Vec::new();
    let mut most = 0;
    // Sizes that hardly ever repeat.
    for round in 0..3000_usize {
        held.push(Memory::new(&allocator, LARGE + (round * 7_368_787) % (15 * MIB)));
        while held.len() > 1 + round % 7 {
            held.swap_remove(round % held.len());
        }
        let usage = allocator.usage();
        most = usage.live.0.max(most);
        assert!(usage.live + usage.cached <= usage.peak, "round {round}: {usage:?}");
    }
    assert!(allocator.usage().peak.0 >= most && most > 0);
    drop(held);
    allocator.release();
}

#[test]
fn smaller_request_reuses_part_of_a_kept_block() {
    let allocator = Allocator::new(AMPLE);
    drop(Memory::new(&allocator, 40 * MIB));
    let held = Memory::new(&allocator, 9 * MIB);
    let usage = allocator.usage();
    assert_eq!((usage.live, usage.peak), (Bytes(9 * Bytes::MIB), Bytes(40 * Bytes::MIB)));
    // The rest begins with a huge page.
    assert_eq!(usage.cached, Bytes(30 * Bytes::MIB));
    let rest = Memory::new(&allocator, 30 * MIB);
    assert_eq!(allocator.usage().cached, Bytes(0));
    drop((held, rest));
    assert_eq!(allocator.usage().cached, Bytes(39 * Bytes::MIB));
}

#[test]
fn size_rounding_wastes_little() {
    let allocator = Allocator::new(0);
    for size in (0..400).map(|step| LARGE + step * 123_457) {
        let memory = Memory::new(&allocator, size);
        let taken = allocator.usage().live.0 as usize;
        assert!(taken >= size && taken - size <= size / 8, "{size} bytes took {taken}");
        drop(memory);
    }
}

/// Resident bytes of the pages between two addresses.
fn resident(start: usize, bytes: usize) -> usize {
    let mut pages = vec![0_u8; bytes / 4096];
    // SAFETY: the vector has a byte for every page asked for.
    let answer = unsafe { libc::mincore(std::ptr::without_provenance_mut(start), bytes, pages.as_mut_ptr()) };
    if answer == 0 { pages.iter().filter(|&&page| page & 1 == 1).count() * 4096 } else { 0 }
}

#[test]
fn released_memory_returns_to_the_system() {
    let allocator = Allocator::new(AMPLE);
    let mut memory = Memory::new(&allocator, 64 * MIB);
    memory.fill(1);
    let start = memory.start.addr();
    assert_eq!(resident(start, 64 * MIB), 64 * MIB);
    drop(memory);
    assert_eq!(allocator.usage().cached, Bytes(64 * Bytes::MIB));
    allocator.release();
    assert_eq!(allocator.usage(), Usage::default());
    // Another thread's mapping may be at the address now; it would not be fully resident.
    assert!(resident(start, 64 * MIB) < 64 * MIB);
}

#[test]
fn vectors_of_the_process_use_the_allocator() {
    let numbers = vec![0.0_f32; 4 * MIB];
    assert_eq!(numbers.as_ptr().addr() % HUGE, 0);
    assert!(sdxl_worker::allocator::usage().live >= Bytes(16 * Bytes::MIB));
}

/// A file of numbers in which no two pages are equal.
fn file_of(count: usize) -> (tempfile::NamedTempFile, Vec<u16>) {
    let numbers: Vec<u16> = (0..count).map(|i| (i * 31 + i / 251) as u16).collect();
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    (file, numbers)
}

/// Lines of this process's table of mappings that name the file.
fn mappings(file: &tempfile::NamedTempFile) -> usize {
    let name = file.path().file_name().unwrap().to_str().unwrap();
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains(name)).count()
}

fn as_bytes(numbers: &[u16]) -> &[u8] {
    // SAFETY: the bytes are those of the numbers, and are borrowed as long.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

#[test]
fn mapped_vector_equals_the_file_until_dropped() {
    let (file, numbers) = file_of(5 * MIB);
    let least = LARGE / 2;
    for (first, count) in [
        (0, least),
        (1, least),
        (2048, least + 1),
        (2047, 3 * MIB),
        (MIB, 4 * MIB),
        (MIB + 9, 4 * MIB - 9),
        (2 * MIB, MIB),
    ] {
        let mapped: Vec<u16> = map_file(file.as_file(), 2 * first as u64, count).unwrap();
        assert_ne!(mapped.as_ptr().addr() % HUGE, 0, "{first}");
        populate(as_bytes(&mapped)).unwrap();
        assert!(mapped == numbers[first..first + count], "{count} from {first}");
        assert_eq!(mappings(&file), 1);
        let second: Vec<u16> = map_file(file.as_file(), 2 * first as u64, count).unwrap();
        drop(mapped);
        assert!(second == numbers[first..first + count]);
        drop(second);
        assert_eq!(mappings(&file), 0, "{count} from {first}");
    }
}

#[test]
fn writes_to_a_mapped_vector_do_not_reach_the_file() {
    let (file, numbers) = file_of(MIB);
    let mut mapped: Vec<u16> = map_file(file.as_file(), 2, MIB - 1).unwrap();
    mapped.fill(7);
    drop(mapped);
    let bytes = std::fs::read(file.path()).unwrap();
    assert!(bytes == as_bytes(&numbers));
}

#[test]
fn mapped_vectors_grow_and_shrink() {
    let (file, numbers) = file_of(4 * MIB);
    for wanted in [10, LARGE / 2 - 1, LARGE / 2, MIB, 3 * MIB - 1] {
        let mut mapped: Vec<u16> = map_file(file.as_file(), 34, 3 * MIB).unwrap();
        mapped.truncate(wanted);
        mapped.shrink_to_fit();
        assert_eq!((mapped.capacity(), mappings(&file)), (wanted, 0));
        assert!(mapped == numbers[17..17 + wanted], "{wanted}");
    }
    let mut mapped: Vec<u16> = map_file(file.as_file(), 34, 3 * MIB).unwrap();
    mapped.push(99);
    assert_eq!((mapped.as_ptr().addr() % HUGE, mappings(&file)), (0, 0));
    assert!(mapped[..3 * MIB] == numbers[17..17 + 3 * MIB] && mapped[3 * MIB] == 99);
}

#[test]
fn unmappable_ranges_are_refused() {
    let (file, numbers) = file_of(MIB);
    let map = |offset, count| map_file::<u16>(file.as_file(), offset, count).is_some();
    assert!(map(0, MIB) && map(2, MIB - 1));
    let cases = [
        ("askew", 1, MIB - 1),
        ("small", 0, LARGE / 2 - 1),
        ("too long", 0, MIB + 1),
        ("beyond the end", 2, MIB),
        ("far beyond", u64::MAX - 1, MIB),
        ("without end", 0, usize::MAX),
        ("of too many bytes", 0, usize::MAX / 2),
    ];
    for (what, offset, count) in cases {
        assert!(!map(offset, count), "{what}");
    }
    assert!(map_file::<f32>(file.as_file(), 2, MIB / 2 - 1).is_none(), "f32 askew");
    assert!(map_file::<f32>(file.as_file(), 4, MIB / 2 - 1).is_some());
    // A file that is truncated later is detected before it is read.
    let mapped: Vec<u16> = map_file(file.as_file(), 0, MIB).unwrap();
    file.as_file().set_len(MIB as u64).unwrap();
    match populate(as_bytes(&mapped)) {
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EFAULT)),
        Ok(()) => println!("NOT SEEN: this kernel cannot populate"),
    }
    assert!(mapped[..MIB / 2] == numbers[..MIB / 2]);
}
