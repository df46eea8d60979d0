//! Emulates AMX on processors that lack it: a SIGILL handler decodes a tile instruction, executes it on registers that it
//! keeps for each thread, and continues behind it. So the machine code of the kernels runs unchanged.
//!
//! Encodings and operations: Intel, Software Developer's Manual, volume 2 (`LDTILECFG` to `TILEZERO`) and volume 1
//! chapter 18. Whatever raises #UD or #GP there, and every other instruction, ends the process. One difference remains: a
//! processor may or may not flush to zero a result that rounds up to the smallest normal number.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![expect(unsafe_code, reason = "a signal handler that reads instructions and their operands")]

use std::cell::UnsafeCell;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sdxl_worker::kernels::amx_probe;

/// The executor of tile instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runner {
    Processor,
    Emulator,
}

impl Runner {
    /// A line for the log, so that no test passes silently without AMX.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Processor => "AMX: run by this processor",
            Self::Emulator => "AMX: not on this machine, run by the emulator",
        }
    }
}

/// Makes AMX available in the whole process, through the emulator if the processor lacks it.
pub(crate) fn install() -> Runner {
    static RUNNER: OnceLock<Runner> = OnceLock::new();
    *RUNNER.get_or_init(|| {
        if amx_probe::available() {
            return Runner::Processor;
        }
        FUSED.store(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"), Ordering::SeqCst);
        // SAFETY: a zeroed action is valid, and the handler has the signature that SA_SIGINFO requires.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_illegal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, ptr::null_mut()), 0, "no handler of SIGILL");
        }
        // SAFETY: the handler executes tile instructions from here on.
        unsafe { amx_probe::assume_available() };
        Runner::Emulator
    })
}

/// Instructions emulated so far.
pub(crate) fn executed() -> u64 {
    EXECUTED.load(Ordering::Relaxed)
}

static EXECUTED: AtomicU64 = AtomicU64::new(0);
/// True if the products may use the processor's fused multiply-add; the library function gives the same bits slowly.
static FUSED: AtomicBool = AtomicBool::new(false);

const TILES: usize = 8;
const ROWS: usize = 16;
/// Four bytes each.
const WORDS: usize = 16;

type Tile = [[u32; WORDS]; ROWS];

/// The tile registers of a thread. Plain data without a destructor, so that a handler may touch it.
struct State {
    configured: bool,
    rows: [usize; TILES],
    row_bytes: [usize; TILES],
    tiles: [Tile; TILES],
}

const EMPTY: Tile = [[0; WORDS]; ROWS];
const RELEASED: State = State { configured: false, rows: [0; TILES], row_bytes: [0; TILES], tiles: [EMPTY; TILES] };

thread_local! {
    static STATE: UnsafeCell<State> = const { UnsafeCell::new(RELEASED) };
}

/// Async-signal-safe: no allocation, no locks, and only the state of its own thread.
extern "C" fn on_illegal(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the third argument is the context of the interrupted thread, which the handler may change.
    // The state is borrowed only here: the signal is blocked while it is handled.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let done = STATE.try_with(|state| execute(registers, &mut *state.get())).unwrap_or(None);
        match done {
            Some(length) => registers[libc::REG_RIP as usize] += length as i64,
            None => {
                let message = b"tile emulator: an instruction that is none of AMX's, or a misuse of one\n";
                libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len());
                libc::abort();
            }
        }
    }
}

/// General registers by their number in instructions.
const NUMBERED: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

type Registers = [libc::greg_t; 23];

fn register(registers: &Registers, number: usize) -> usize {
    registers[NUMBERED[number & 15] as usize] as usize
}

/// The fields of a VEX instruction of map 0F38. Only three-byte VEX (C4) reaches that map.
struct Instruction {
    at: usize,
    /// 0 none, 1 66, 2 F3, 3 F2
    prefix: u8,
    opcode: u8,
    mode: u8,
    /// `ModRM.reg` with VEX.R
    reg: usize,
    /// `ModRM.rm` without VEX.B
    rm: usize,
    /// VEX.vvvv
    third: usize,
    /// VEX.X and VEX.B, as 0 or 8
    x: usize,
    b: usize,
}

/// A memory operand; `stride` is the scaled index register.
struct MemoryOperand {
    start: usize,
    stride: usize,
    length: usize,
    has_sib: bool,
}

fn byte(at: usize) -> u8 {
    // SAFETY: the byte is part of an instruction that the processor has fetched.
    unsafe { *(at as *const u8) }
}

fn displacement(at: usize) -> usize {
    // SAFETY: the bytes are part of an instruction that the processor has fetched.
    (unsafe { (at as *const i32).read_unaligned() }) as isize as usize
}

fn decode(at: usize) -> Option<Instruction> {
    if byte(at) != 0xc4 {
        return None;
    }
    let (first, second) = (byte(at + 1), byte(at + 2));
    let (map, wide, long) = (first & 0x1f, second & 0x80 != 0, second & 4 != 0);
    if map != 2 || wide || long {
        return None;
    }
    let inverted = |set: bool| if set { 0 } else { 8 };
    let modrm = byte(at + 4);
    Some(Instruction {
        at,
        prefix: second & 3,
        opcode: byte(at + 3),
        mode: modrm >> 6,
        reg: usize::from(modrm >> 3 & 7) | inverted(first & 0x80 != 0),
        rm: usize::from(modrm & 7),
        third: usize::from(!second >> 3 & 15),
        x: inverted(first & 0x40 != 0),
        b: inverted(first & 0x20 != 0),
    })
}

fn memory_operand(instruction: &Instruction, registers: &Registers) -> MemoryOperand {
    let Instruction { at, mode, rm, x, b, .. } = *instruction;
    let mut next = at + 5;
    let has_sib = rm == 4;
    let (mut start, mut stride) = (0, 0);
    if has_sib {
        let sib = byte(next);
        next += 1;
        let (scale, index, base) = (sib >> 6, usize::from(sib >> 3 & 7) | x, usize::from(sib & 7));
        // Index 4 without VEX.X means none; base 5 in mode 0 means a displacement alone.
        if index != 4 {
            stride = register(registers, index) << scale;
        }
        if base == 5 && mode == 0 {
            start = displacement(next);
            next += 4;
        } else {
            start = register(registers, base | b);
        }
    } else if rm == 5 && mode == 0 {
        start = displacement(next).wrapping_add(next + 4); // relative to the next instruction
        next += 4;
    } else {
        start = start.wrapping_add(register(registers, rm | b));
    }
    match mode {
        1 => {
            start = start.wrapping_add(byte(next) as i8 as isize as usize);
            next += 1;
        }
        2 => {
            start = start.wrapping_add(displacement(next));
            next += 4;
        }
        _ => {}
    }
    MemoryOperand { start, stride, length: next - at, has_sib }
}

/// Executes the instruction at RIP and returns its length, or `None` if it is no tile instruction or raises a fault.
fn execute(registers: &Registers, state: &mut State) -> Option<usize> {
    const REGISTER_FORM: usize = 5;
    let instruction = decode(register_rip(registers))?;
    let Instruction { prefix, opcode, mode, reg, rm, third, b, .. } = instruction;
    let in_register = mode == 3;
    match (opcode, prefix, in_register) {
        (0x49, 0, false) if reg == 0 && third == 0 => {
            let operand = memory_operand(&instruction, registers);
            // `ldtilecfg` has an ordinary operand, whose index is added once.
            configure(state, operand.start.wrapping_add(operand.stride))?;
            count(operand.length)
        }
        (0x49, 0, true) if reg == 0 && rm == 0 && b == 0 && third == 0 => {
            *state = RELEASED;
            count(REGISTER_FORM)
        }
        (0x49, 3, true) if rm == 0 && b == 0 && third == 0 => {
            usable(state, reg)?;
            state.tiles[reg] = EMPTY;
            count(REGISTER_FORM)
        }
        (0x4b, 1..=3, false) if third == 0 => {
            usable(state, reg)?;
            let operand = memory_operand(&instruction, registers);
            if !operand.has_sib {
                return None;
            }
            match prefix {
                2 => store(state, reg, &operand),
                _ => load(state, reg, &operand),
            }
            count(operand.length)
        }
        (0x5c, 2, true) if b == 0 => {
            multiply(state, (reg, rm, third), multiply_bf16)?;
            count(REGISTER_FORM)
        }
        (0x5e, 3, true) if b == 0 => {
            multiply(state, (reg, rm, third), multiply_bytes)?;
            count(REGISTER_FORM)
        }
        _ => None,
    }
}

fn register_rip(registers: &Registers) -> usize {
    registers[libc::REG_RIP as usize] as usize
}

fn count(length: usize) -> Option<usize> {
    EXECUTED.fetch_add(1, Ordering::Relaxed);
    Some(length)
}

/// `Some` if the tile exists and is configured.
fn usable(state: &State, tile: usize) -> Option<()> {
    (state.configured && tile < TILES && state.rows[tile] != 0).then_some(())
}

fn configure(state: &mut State, at: usize) -> Option<()> {
    // SAFETY: the operand is 64 bytes; if they cannot be read, the processor would fault as well.
    let bytes = unsafe { (at as *const [u8; 64]).read_unaligned() };
    *state = RELEASED;
    if bytes[0] == 0 {
        return Some(());
    }
    // The bytes before the entries of the first tile and after those of the eighth are reserved.
    let reserved = bytes[2..16].iter().chain(&bytes[32..48]).chain(&bytes[56..64]);
    if bytes[0] != 1 || reserved.copied().any(|byte| byte != 0) {
        return None;
    }
    for tile in 0..TILES {
        let row_bytes = usize::from(bytes[16 + 2 * tile]) | usize::from(bytes[17 + 2 * tile]) << 8;
        let rows = usize::from(bytes[48 + tile]);
        if rows > ROWS || row_bytes > 4 * WORDS || (rows == 0) != (row_bytes == 0) {
            return None;
        }
        state.rows[tile] = rows;
        state.row_bytes[tile] = row_bytes;
    }
    // An interrupted load would resume at this row; the emulator never interrupts one.
    if bytes[1] != 0 {
        return None;
    }
    state.configured = true;
    Some(())
}

fn load(state: &mut State, tile: usize, operand: &MemoryOperand) {
    let (rows, row_bytes) = (state.rows[tile], state.row_bytes[tile]);
    state.tiles[tile] = EMPTY;
    for (row, words) in state.tiles[tile].iter_mut().take(rows).enumerate() {
        let from = operand.start.wrapping_add(row.wrapping_mul(operand.stride));
        // SAFETY: the row of a tile is at least `row_bytes` long; memory that cannot be read faults as on a processor.
        unsafe { ptr::copy_nonoverlapping(from as *const u8, words.as_mut_ptr().cast::<u8>(), row_bytes) };
    }
}

fn store(state: &State, tile: usize, operand: &MemoryOperand) {
    let (rows, row_bytes) = (state.rows[tile], state.row_bytes[tile]);
    for (row, words) in state.tiles[tile].iter().take(rows).enumerate() {
        let to = operand.start.wrapping_add(row.wrapping_mul(operand.stride));
        // SAFETY: as in `load`.
        unsafe { ptr::copy_nonoverlapping(words.as_ptr().cast::<u8>(), to as *mut u8, row_bytes) };
    }
}

/// The operands of a product: `sums` is `rows` × 16 words, `left` `rows` × `depth` words, `right` `depth` × 16 words.
struct Factors<'a> {
    sums: &'a mut Tile,
    left: &'a Tile,
    right: &'a Tile,
    rows: usize,
    depth: usize,
}

fn multiply(
    state: &mut State,
    (sums, left, right): (usize, usize, usize),
    product: fn(&mut Factors<'_>),
) -> Option<()> {
    for tile in [sums, left, right] {
        usable(state, tile)?;
        if !state.row_bytes[tile].is_multiple_of(4) {
            return None;
        }
    }
    let depth = state.row_bytes[left] / 4;
    let fits = state.rows[sums] == state.rows[left]
        && state.row_bytes[sums] == state.row_bytes[right]
        && state.rows[right] == depth;
    if !fits {
        return None;
    }
    let rows = state.rows[sums];
    // Fails if two of the three are one register, which raises #UD. Words beyond a tile's columns are zero in
    // `right`, so that they stay zero in the sums.
    let [sums, left, right] = state.tiles.get_disjoint_mut([sums, left, right]).ok()?;
    product(&mut Factors { sums, left, right, rows, depth });
    Some(())
}

/// Flushes denormals to zero of their sign.
#[inline(always)]
fn flush(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

/// The two bf16 of a word, the lower first.
#[inline(always)]
fn pair(word: u32) -> (f32, f32) {
    (flush(f32::from_bits(word << 16)), flush(f32::from_bits(word & 0xffff_0000)))
}

/// `TDPBF16PS`: even and odd numbers are summed separately by fused multiply-add, then together, then added to the sums.
#[inline(always)]
fn bf16_products(factors: &mut Factors<'_>) {
    let Factors { sums, left, right, rows, depth } = factors;
    for (sums, left) in sums.iter_mut().zip(left.iter()).take(*rows) {
        let (mut even, mut odd) = ([0f32; WORDS], [0f32; WORDS]);
        for (left, right) in left.iter().zip(right.iter()).take(*depth) {
            let (left_even, left_odd) = pair(*left);
            for column in 0..WORDS {
                let (right_even, right_odd) = pair(right[column]);
                even[column] = flush(left_even.mul_add(right_even, even[column]));
                odd[column] = flush(left_odd.mul_add(right_odd, odd[column]));
            }
        }
        for column in 0..WORDS {
            let sum = flush(f32::from_bits(sums[column])) + flush(even[column] + odd[column]);
            sums[column] = flush(sum).to_bits();
        }
    }
}

#[target_feature(enable = "avx2,fma")]
fn bf16_products_fused(factors: &mut Factors<'_>) {
    bf16_products(factors);
}

fn multiply_bf16(factors: &mut Factors<'_>) {
    if FUSED.load(Ordering::Relaxed) {
        // SAFETY: the flag is set only if both features were detected.
        unsafe { bf16_products_fused(factors) }
    } else {
        bf16_products(factors);
    }
}

/// `TDPBSSD`: adds four products of signed bytes to each sum, which wraps around.
fn multiply_bytes(factors: &mut Factors<'_>) {
    let Factors { sums, left, right, rows, depth } = factors;
    for (sums, left) in sums.iter_mut().zip(left.iter()).take(*rows) {
        for (left, right) in left.iter().zip(right.iter()).take(*depth) {
            let left = left.to_le_bytes().map(|byte| i32::from(byte as i8));
            for (sum, right) in sums.iter_mut().zip(right) {
                let right = right.to_le_bytes().map(|byte| i32::from(byte as i8));
                let products: i32 = left.iter().zip(right).map(|(left, right)| left * right).sum();
                *sum = sum.wrapping_add(products as u32);
            }
        }
    }
}
