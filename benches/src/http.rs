//! A load maker's HTTP/1.1: one keep-alive connection on a blocking socket, bodies read into one buffer and dropped.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, bail, ensure};

/// Bytes read at once from a body.
const READ_BYTES: usize = 1 << 20;

/// One connection.
pub struct Connection {
    reader: BufReader<TcpStream>,
    addr: SocketAddr,
    sink: Vec<u8>,
}

/// What a response said; its body was read and dropped.
pub struct Response {
    pub status: u16,
    pub location: Option<String>,
    pub body_bytes: u64,
}

impl Connection {
    pub fn open(addr: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(addr).with_context(|| format!("connecting to {addr}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { reader: BufReader::with_capacity(64 << 10, stream), addr, sink: vec![0; READ_BYTES] })
    }

    /// Sends one request and reads its whole response.
    pub fn call(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> anyhow::Result<Response> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n{headers}\r\n",
            self.addr,
            body.len()
        );
        let stream = self.reader.get_mut();
        if body.len() <= 64 << 10 {
            stream.write_all(&[head.as_bytes(), body].concat())?;
        } else {
            stream.write_all(head.as_bytes())?;
            stream.write_all(body)?;
        }
        self.response(method == "HEAD").with_context(|| format!("{method} {path}"))
    }

    /// Like [`Connection::call`], but another status than `expected` is an error.
    pub fn expect(
        &mut self,
        expected: u16,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> anyhow::Result<Response> {
        let response = self.call(method, path, headers, body)?;
        ensure!(response.status == expected, "{method} {path}: {} instead of {expected}", response.status);
        Ok(response)
    }

    fn response(&mut self, headless: bool) -> anyhow::Result<Response> {
        let status_line = self.line()?;
        let status = status_line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let Some(status) = status else { bail!("not an HTTP response: {status_line:?}") };
        let mut response = Response { status, location: None, body_bytes: 0 };
        let (mut length, mut chunked) = (0, false);
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').context("a header without a colon")?;
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse()?,
                "transfer-encoding" => chunked = value.eq_ignore_ascii_case("chunked"),
                "location" => response.location = Some(path_of(value).to_owned()),
                _ => {}
            }
        }
        if headless || status == 204 || status == 304 {
            return Ok(response);
        }
        if !chunked {
            self.skip(length)?;
            response.body_bytes = length;
            return Ok(response);
        }
        loop {
            let size = self.line()?;
            let size = u64::from_str_radix(size.split(';').next().unwrap_or_default(), 16)?;
            self.skip(size)?;
            response.body_bytes += size;
            self.line()?;
            if size == 0 {
                return Ok(response);
            }
        }
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line)?;
        ensure!(read > 0, "the server closed the connection");
        Ok(line.trim_end().to_owned())
    }

    fn skip(&mut self, mut bytes: u64) -> anyhow::Result<()> {
        while bytes > 0 {
            let want = self.sink.len().min(usize::try_from(bytes)?);
            let read = self.reader.read(&mut self.sink[..want])?;
            ensure!(read > 0, "the body ended {bytes} bytes early");
            bytes -= read as u64;
        }
        Ok(())
    }
}

/// The path and query of a Location, which may be a whole URL.
fn path_of(location: &str) -> &str {
    match location.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |slash| &rest[slash..]),
        None => location,
    }
}
