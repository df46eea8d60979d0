//! sdxl-worker: newline-delimited JSON in, SDXL images out.
//!
//! # The map
//!
//! A request is a line on stdin, its answer a line on stdout; `src/communication/PROTOCOL.md` is the contract. Four
//! layers stand between them, each with one question, and seven domains, each a folder in which the file names spell
//! the layers:
//!
//! | layer | question | owns | may not |
//! |---|---|---|---|
//! | interface | what can be asked? | request, response and settings types of a domain | hold state, touch tensors |
//! | instructor | what shall be done? | defaults, checks, order of work | hold weights, do arithmetic on tensors |
//! | manager | what is kept? | one kind of long-lived resource, and its bytes | know requests |
//! | worker | how is it done? | one algorithm, stateless between calls | call upwards, cache, do protocol I/O |
//!
//! ```text
//! stdin ─▶ reader ─▶ codec ─▶ admission ─▶ │ lane │ ─▶ Instructors::dispatch ─▶ Instructor ─▶ Managers ─▶ ctx.perform(Worker)
//! stdout ◀─ writer ◀─ ledger ◀── events ◀──│      │ ◀─ progress / Reply / Error ◀─────────────────────────────────────────
//! ```
//!
//! Above the lane: async, JSON, no tensors. Below it: blocking, tensors, no tokio. A lane is one thread that owns its
//! managers as plain fields. There are three: `compute` makes images, `query` answers requests that need no compute
//! while an image is made, and `hub` downloads. The latter two have managers of their own that stay empty; they read the
//! state of the compute lane from [`managers::Published`].
//!
//! | where | what |
//! |---|---|
//! | [`units`] [`error`] [`context`] [`layers`] [`registry`] | the ground: quantities, the one error type, what travels with a request, the four traits, open sets by name |
//! | [`allocator`] | the allocator: large blocks on huge pages, kept for reuse; vectors that are parts of files |
//! | [`roots`] | the folders beneath which requests may name files |
//! | [`noise`] | Gaussian noise equal to torch's CPU generator, and to CUDA's Philox |
//! | [`image`] | pictures at another size, RGB images and tensors, and images that requests bring |
//! | [`kernels`] | linear, convolution, attention, norms, and the loader of their weights: `src/kernels/cpu/` on the CPU, `src/kernels/reference.rs` everywhere, the measure of the other |
//! | [`device`] | which device, which dtype, how much memory |
//! | [`scheduler`] | schedules of σ and samplers, which see x₀(x, level) and no network |
//! | [`model`] | checkpoints in folders and single files, the hub, weights, adapters (`lora/formats/`), the shelves on which networks are kept and their one budget (`managers/budget.rs`), and the networks (`networks/`) |
//! | [`postprocessing`] | image files, their metadata and names; above conditioning, which delivers hints as images |
//! | [`conditioning`] | prompts to embeddings, images to hints |
//! | [`managers`] | every manager as a plain field, and what the compute thread publishes: throughput, residents, memory |
//! | [`inference`] | the recipe of an image: one run over latents or several; prediction type, guidance, masks and what ControlNets and adapters add live in its workers; `plan/memory_policy.rs` is what is done where memory is short |
//! | [`runtime`] | `configs/workers_config.json` and the flags over it, the compute thread, the one match over domains |
//! | [`communication`] | the wire |
//!
//! # Invariants
//!
//! - A module uses only what stands above it in the list below, and in a domain no layer to its left.
//! - Feature maps are `[B, H, W, C]` and tokens `[B, L, C]` everywhere; NCHW exists in weight files and fixtures only.
//! - Schedules are f64 on the host; latents are f32 between steps; norms and softmax reduce in f32.
//! - A network is never altered: what adapters change is built beside it, and shares every other layer with it.
//! - Every image's noise is its own stream, and every image is computed alone: it depends on its request only.
//! - `serde_json` is used in communication, config, the model's files and image metadata; `tokio` in main and
//!   communication.
//! - User input never panics; what a panic leaves behind is rebuilt, and the request gets `internal`.
//! - Exactly one terminal line answers each line of input.
//!
//! `tests/it/architecture.rs` enforces what of this can be read off the sources.
//!
//! # What is absent
//!
//! Upscaling by networks and safety checks: their operations and fields answer `unsupported_feature`. ControlNet-LLLite,
//! preprocessors that are networks, IP-Adapter's FaceID and Full Face and its masks, light T2I-Adapters, PEFT's own OFT and
//! BOFT, masks and a second pass with instruct-pix2pix, and distilled samplers with EDM models are refused by name.
//! `dpmpp_sde` is left out.

pub mod units;
pub mod error;
pub mod context;
pub mod layers;
pub mod registry;
pub mod allocator;
pub mod roots;
pub mod noise;
pub mod image;
pub mod kernels;
pub mod device;
pub mod scheduler;
pub mod model;
pub mod postprocessing;
pub mod conditioning;
pub mod managers;
pub mod inference;
pub mod runtime;
pub mod communication;
