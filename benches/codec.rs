//! The codec without a model: one line of JSON to a typed request or an error.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sdxl_worker::communication::workers::codec;

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("codec");
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    let long = format!(r#"{{"prompt":"{}"}}"#, "a hill, ".repeat(100_000));
    let lines = [
        ("shorthand", r#"{"prompt":"A sunset over mountains","steps":25}"#.to_owned()),
        (
            "whole",
            r#"{"request_id":"r-17","worker_type":"inference","operation":"generate","data":{"prompt":"A castle",
               "num_inference_steps":20,"width":1024,"height":1024,"seed":7},"priority":3,"events":{"progress":true}}"#
                .replace('\n', ""),
        ),
        ("unknown key", r#"{"prompt":"a","stepz":25}"#.to_owned()),
        ("prompt of 800 kB", long),
    ];
    for (name, line) in &lines {
        group.throughput(Throughput::Bytes(line.len() as u64));
        group.bench_function(*name, |b| {
            b.iter(|| black_box(codec::decode(black_box(line.as_bytes()), "auto-1")).is_ok());
        });
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);
