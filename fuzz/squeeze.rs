//! Turns image files into inputs for the fuzz targets: `cargo run --example squeeze -- IMAGE INPUT`; `-x INPUT IMAGE` is
//! the way back.

#[path = "sparse.rs"]
mod sparse;

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["-x", input, image] => std::fs::write(image, sparse::expand(&std::fs::read(input)?)),
        [image, input] => std::fs::write(input, sparse::squeeze(&std::fs::read(image)?)),
        _ => Err(std::io::Error::other("usage: squeeze IMAGE INPUT | squeeze -x INPUT IMAGE")),
    }
}
