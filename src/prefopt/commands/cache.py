"""``prefopt cache``: what is kept between runs, listed, checked and removed."""

from __future__ import annotations

from datetime import datetime

from prefopt.config.cache import CacheClearConfig, CacheListConfig, CacheVerifyConfig
from prefopt.data.token_cache import list_tokens, verify_tokens
from prefopt.disk.cache import reference_folder, samples_folder, tokens_folder
from prefopt.disk.entries import clear, last_used, model_of, sample_entries, size_of
from prefopt.generate.output import verify_samples
from prefopt.model.spaces import list_spaces, verify
from prefopt.progress import size
from prefopt.screen import tell


def list_cache(_: CacheListConfig) -> int:
    spaces = list_spaces()
    tell(f"{reference_folder()}: {len(spaces)} space{'s' * (len(spaces) != 1)}, {size(sum(s.bytes for s in spaces))}")
    for s in spaces:
        scored = ", ".join(str(s.about[key]) for key in ("dtype", "path", "kernel", "device") if key in s.about)
        used = s.last_used.astimezone().strftime("%Y-%m-%d %H:%M")
        model = s.about.get("model") or "description unreadable"
        tell(f"{s.id}  {s.responses:>9,} responses  {size(s.bytes):>9}  last used {used}  {model} ({scored})")
    tokens = list_tokens()
    if tokens:
        tell(f"{tokens_folder()}: {len(tokens)} tokenised, {size(sum(t.bytes for t in tokens))}")
    for t in tokens:
        used = t.last_used.astimezone().strftime("%Y-%m-%d %H:%M")
        file = t.about.get("file") or "description unreadable"
        tell(f"{t.id}  {t.groups:>9,} groups  {size(t.bytes):>9}  last used {used}  {file}")
    samples = sample_entries()
    if samples:
        tell(f"{samples_folder()}: {len(samples)} sets of samples, {size(sum(map(size_of, samples)))}")
    for folder in samples:
        used = datetime.fromtimestamp(last_used(folder)).strftime("%Y-%m-%d %H:%M")
        tell(f"{folder.name}  {size(size_of(folder)):>9}  last used {used}  {model_of(folder)}")
    return 0


def verify_cache(config: CacheVerifyConfig) -> int:
    problems = [(problem.file, problem.what) for problem in verify(repair=config.repair)]
    problems += [*verify_tokens(repair=config.repair), *verify_samples(repair=config.repair)]
    for file, what in problems:
        tell(f"{file}: {what}{'; taken out of use' if config.repair else ''}")
    if not problems:
        tell("every file is what was written")
    elif not config.repair:
        tell(f"{len(problems)} damaged; prefopt cache verify --repair takes them out of use")
    return 1 if problems and not config.repair else 0


def clear_cache(config: CacheClearConfig) -> int:
    freed = clear(ids=config.space, older_than_days=config.older_than)
    tell(f"{size(freed)} freed")
    return 0
