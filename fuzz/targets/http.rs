#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cyberscan_relay::fuzz::http(input));
