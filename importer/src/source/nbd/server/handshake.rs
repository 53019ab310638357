//! What client and server agree about before there are requests.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use super::super::NAME_BYTES_MAX;
use super::super::connection::Stream;
use super::super::wire::{self, Fields};
use super::wrong;

/// Options that a client may send.
const OPTIONS_MAX: usize = 64;
/// Longest option, bytes: a name, and some queries.
const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Padding of the oldest answer to a name.
const PADDING_BYTES: usize = 124;
/// The unit of requests that suits the disk, bytes.
const BLOCK_BYTES_PREFERRED: u32 = 4096;

/// What was agreed about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Terms {
    /// Answers may have several chunks, and holes.
    pub(super) is_structured: bool,
    /// Block status may be asked for.
    pub(super) has_status: bool,
}

/// Negotiates until the client wants the export, or leaves.
pub(super) async fn negotiate(
    mut stream: Box<dyn Stream>,
    size: u64,
    tls: Option<&TlsAcceptor>,
) -> io::Result<Option<(Box<dyn Stream>, Terms)>> {
    let offered = wire::FIXED_NEWSTYLE | wire::NO_ZEROES;
    let hello = [&wire::MAGIC.to_be_bytes()[..], &wire::OPTION_MAGIC.to_be_bytes(), &offered.to_be_bytes()];
    stream.write_all(&hello.concat()).await?;
    stream.flush().await?;
    let flags = stream.read_u32().await?;
    if flags & !u32::from(offered) != 0 {
        return Err(wrong(format!("sets flags that were not offered ({flags:#x})")));
    }
    let (mut terms, mut tls) = (Terms::default(), tls);
    for _ in 0..OPTIONS_MAX {
        let Some((option, data)) = read_option(&mut stream).await? else { return Ok(None) };
        let is_open = tls.is_none();
        match option {
            wire::OPT_ABORT => {
                // The client need not wait for it.
                let _ = reply(&mut stream, option, wire::REP_ACK, &[]).await;
                return Ok(None);
            }
            wire::OPT_EXPORT_NAME if is_open => {
                let mut export = export(size, terms).to_vec();
                let padded = flags & u32::from(wire::NO_ZEROES) == 0;
                export.resize(export.len() + if padded { PADDING_BYTES } else { 0 }, 0);
                stream.write_all(&export).await?;
                stream.flush().await?;
                return Ok(Some((stream, terms)));
            }
            // There is no reply that says no.
            wire::OPT_EXPORT_NAME => return Err(wrong("does not begin TLS")),
            wire::OPT_STARTTLS => match tls.take() {
                Some(acceptor) if data.is_empty() => {
                    reply(&mut stream, option, wire::REP_ACK, &[]).await?;
                    stream = Box::new(acceptor.accept(stream).await?);
                    terms = Terms::default();
                }
                Some(_) => return Err(wrong("begins TLS with data")),
                None => reply(&mut stream, option, wire::REP_ERR_UNSUP, &[]).await?,
            },
            _ if !is_open => reply(&mut stream, option, wire::REP_ERR_TLS_REQD, &[]).await?,
            wire::OPT_INFO | wire::OPT_GO => {
                if parse_name_and(&data, |fields| (0..fields.u16()?).try_for_each(|_| fields.u16().map(drop)))
                    .is_err()
                {
                    reply(&mut stream, option, wire::REP_ERR_INVALID, &[]).await?;
                    continue;
                }
                let export = [&wire::INFO_EXPORT.to_be_bytes()[..], &export(size, terms)].concat();
                reply(&mut stream, option, wire::REP_INFO, &export).await?;
                let sizes =
                    [1, BLOCK_BYTES_PREFERRED, wire::REQUEST_BYTES_MAX].map(u32::to_be_bytes).concat();
                let blocks = [&wire::INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes].concat();
                reply(&mut stream, option, wire::REP_INFO, &blocks).await?;
                reply(&mut stream, option, wire::REP_ACK, &[]).await?;
                if option == wire::OPT_GO {
                    return Ok(Some((stream, terms)));
                }
            }
            wire::OPT_LIST if data.is_empty() => {
                reply(&mut stream, option, wire::REP_SERVER, &[0; 4]).await?;
                reply(&mut stream, option, wire::REP_ACK, &[]).await?;
            }
            wire::OPT_STRUCTURED_REPLY if data.is_empty() => {
                terms.is_structured = true;
                reply(&mut stream, option, wire::REP_ACK, &[]).await?;
            }
            wire::OPT_LIST_META_CONTEXT | wire::OPT_SET_META_CONTEXT if terms.is_structured => {
                let is_list = option == wire::OPT_LIST_META_CONTEXT;
                let Ok(wants) = wants_allocation(&data, is_list) else {
                    reply(&mut stream, option, wire::REP_ERR_INVALID, &[]).await?;
                    continue;
                };
                if wants {
                    let context = [&wire::CONTEXT_ID.to_be_bytes()[..], wire::ALLOCATION.as_bytes()].concat();
                    reply(&mut stream, option, wire::REP_META_CONTEXT, &context).await?;
                }
                terms.has_status = if is_list { terms.has_status } else { wants };
                reply(&mut stream, option, wire::REP_ACK, &[]).await?;
            }
            wire::OPT_LIST
            | wire::OPT_STRUCTURED_REPLY
            | wire::OPT_LIST_META_CONTEXT
            | wire::OPT_SET_META_CONTEXT => reply(&mut stream, option, wire::REP_ERR_INVALID, &[]).await?,
            _ => reply(&mut stream, option, wire::REP_ERR_UNSUP, &[]).await?,
        }
    }
    Err(wrong(format!("sends more than {OPTIONS_MAX} options")))
}

/// The next option with its data; `None` if the client has gone.
async fn read_option(stream: &mut Box<dyn Stream>) -> io::Result<Option<(u32, Vec<u8>)>> {
    match stream.read_u64().await {
        Ok(wire::OPTION_MAGIC) => {}
        Ok(other) => return Err(wrong(format!("sends {other:#018x} where an option begins"))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let (option, len) = (stream.read_u32().await?, stream.read_u32().await?);
    if len > OPTION_BYTES_MAX {
        return Err(wrong(format!("sends option {option} with {len} bytes")));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data).await?;
    Ok(Some((option, data)))
}

async fn reply(stream: &mut Box<dyn Stream>, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    stream.write_all(&wire::reply_to_option(option, kind, data)).await?;
    stream.flush().await
}

/// Size and transmission flags.
fn export(size: u64, terms: Terms) -> [u8; 10] {
    let mut flags = wire::HAS_FLAGS | wire::READ_ONLY | wire::SEND_FLUSH | wire::CAN_MULTI_CONN;
    if terms.is_structured {
        flags |= wire::SEND_DF;
    }
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&size.to_be_bytes());
    bytes[8..].copy_from_slice(&flags.to_be_bytes());
    bytes
}

/// Reads the name that an option begins with, whatever it is, and what comes behind up to the end.
fn parse_name_and<T>(data: &[u8], rest: impl FnOnce(&mut Fields<'_>) -> io::Result<T>) -> io::Result<T> {
    let mut fields = Fields(data);
    let name = fields.u32()? as usize;
    if name > NAME_BYTES_MAX {
        return Err(wrong("asks for a long name"));
    }
    fields.bytes(name)?;
    let parsed = rest(&mut fields)?;
    if fields.0.is_empty() { Ok(parsed) } else { Err(wrong("sends more than it announced")) }
}

/// Whether one of the queries of an option means `base:allocation`; a list without queries means all.
fn wants_allocation(data: &[u8], is_list: bool) -> io::Result<bool> {
    parse_name_and(data, |fields| {
        let queries = fields.u32()?;
        let mut wants = is_list && queries == 0;
        for _ in 0..queries {
            let len = fields.u32()? as usize;
            let query = fields.bytes(len)?;
            wants |= query == wire::ALLOCATION.as_bytes() || is_list && query == b"base:";
        }
        Ok(wants)
    })
}
