//! sdxl-worker: newline-delimited JSON in, SDXL images out.
//!
//! # The map
//!
//! Each line on stdin is a request, and each gets its answer as a line on stdout; `src/communication/PROTOCOL.md` is the
//! contract. `docs/walkthrough.md` follows one line through the code. There are seven domains, one folder each, and four
//! layers. Files and folders of a domain have the names of its layers: `interface`, `instructor`, `manager` or `managers`,
//! `workers`. In `inference`, `request` belongs to the interface and `plan` to the instructor.
//!
//! | layer | question | owns | may not |
//! |---|---|---|---|
//! | interface | What can be requested? | types of requests, responses and settings | keep state, touch tensors, use the other layers |
//! | instructor | What is done? | defaults, checks, order of work | keep weights, run networks |
//! | manager | What is kept? | one kind of long-lived resource and its bytes; in `inference`, a running generation | use an instructor of its domain |
//! | worker | How is it done? | one algorithm, stateless between calls | use the layers above it, keep state, read or write lines |
//!
//! ```text
//! stdin ─▶ reader ─▶ codec ─▶ dispatcher ─▶ │ lane │ ─▶ Instructors::dispatch ─▶ Instructor ─▶ Managers ─▶ ctx.perform(Worker)
//! stdout ◀─ writer ◀─ ledger ◀─ dispatcher ◀│      │ ◀─ Progress / Reply / Error ◀──────────────────────────────────────────
//! ```
//!
//! Above the lane, code is async and sees no tensors. Below it, code blocks and does not know tokio. The event loop owns the
//! dispatcher, and the dispatcher owns the ledger and the queues in front of the lanes. A lane is one thread that owns its
//! instructors and managers as plain fields. There are three: `compute` makes images, `query` answers requests that need
//! no compute while an image is made, and `hub` downloads. Only the compute lane keeps weights; the other two read its
//! state from [`managers::Published`]. All networks share one budget, [`model::managers::Budget`].
//!
//! | where | what |
//! |---|---|
//! | [`units`] [`error`] [`context`] [`layers`] [`registry`] | the base: quantities, the error type, the context of a request, the layers as traits, named entries |
//! | [`allocator`] | the global allocator: reuses large blocks on huge pages, and maps parts of files as vectors |
//! | [`roots`] | the folders that requests may read and write files in |
//! | [`noise`] | Gaussian noise equal to torch's CPU generator, and Philox by its published formulas |
//! | [`image`] | RGB images and tensors, resampling, and image files of requests |
//! | [`kernels`] | linear, convolution, attention, norms, and the loader of their weights: `src/kernels/cpu/` on the CPU, `src/kernels/reference.rs` everywhere, against which the former is tested |
//! | [`device`] | device, dtypes and memory of a request |
//! | [`scheduler`] | noise schedules and samplers, which call x₀(x, level) and see no network |
//! | [`model`] | the `catalog` of models, `checkpoint` in folders and single files, `hub`, `weights`, `lora` and textual inversions, `networks`, and the `managers` that keep networks |
//! | [`postprocessing`] | upscalers, image formats, metadata, and writing files; above conditioning, which writes hints as images |
//! | [`conditioning`] | prompts to embeddings, images to hints, init images and masks |
//! | [`managers`] | every manager as a plain field, the order in which they free memory, and the state that the compute lane publishes |
//! | [`inference`] | generation: `request` holds the wire types, `plan` the decisions, `managers` the loop over passes and its memory, `workers` denoising, guidance and decoding |
//! | [`runtime`] | flags and configuration, the lanes' threads, the one match over domains |
//! | [`communication`] | the wire: event loop, codec, dispatcher, ledger, writer |
//!
//! # Invariants
//!
//! - A module uses only modules above it in the list below. Within a domain, workers use no manager, managers use no
//!   instructor, and the interface uses none of the three. No more than three files import each other in a circle.
//! - Feature maps are `[B, H, W, C]` and tokens `[B, L, C]` everywhere; only weight files and fixtures have NCHW.
//! - Schedules are f64 on the host; latents are f32 between steps; norms and softmax reduce in f32.
//! - Requests and plans hold no tensors.
//! - A loaded network never changes. An adapted network is a second one, which shares every unchanged layer with the first.
//! - Each image has a noise stream of its own and is computed alone: it depends on its request only.
//! - `serde_json` is used in communication, configuration, model files and image metadata; `tokio` in communication.
//! - Input never causes a panic. If a lane panics nevertheless, it rebuilds its managers, and the request gets `internal`.
//! - Each line that is not blank gets exactly one terminal line.
//!
//! `tests/it/architecture.rs` enforces the rules that can be checked in the sources.
//!
//! # What is absent
//!
//! Network upscalers and safety checks (`upscale`, `enhance`, `check_safety`), and preprocessors that are networks, answer
//! `unsupported_feature`. Refused are also ControlNet-LLLite, IP-Adapter's FaceID, Full Face and masks, light T2I-Adapters,
//! PEFT's own OFT and BOFT files, masks and a second pass with instruct-pix2pix, and distilled samplers with EDM models. The
//! sampler `dpmpp_sde` is missing.

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
