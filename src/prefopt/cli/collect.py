"""The commands of ``prefopt collect``: create, serve, count, export and check a study."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config import collect
from prefopt.core.plugins import needing
from prefopt.core.terminal import size, tell, tell_json, tell_lines
from prefopt.data.files.write import ENDINGS, row_files
from prefopt.data.sampler import split_by_prompt
from prefopt.data.table import KEY
from prefopt.errors import ConfigError, DataError, StudyError
from prefopt.studies.annotators import annotators, invite, revoke
from prefopt.studies.export import Exported, ExportOptions, export_rows, vote_rows
from prefopt.studies.items import NewItem, add_items, for_everyone
from prefopt.studies.quality import MEANING
from prefopt.studies.served import address_of
from prefopt.studies.study import Study, StudySettings, backup, check_study_file
from prefopt.studies.summary import Estimate, StudySummary, summarise

NOT_SERVED = "http://127.0.0.1:8700"


def collect_new(config: collect.CollectNewConfig) -> int:
    from prefopt.collect.import_items import items_from_models

    path = Path(config.study)
    if path.exists():
        raise StudyError(f"{path}: exists; name another file, or add to it with prefopt collect import")
    instructions = _read_text(config.instructions) if config.instructions else ""
    items = _gathered(config)
    folder = path.with_name(path.name + ".samples")
    if config.model is not None:
        found = items_from_models(config, folder)
        for line in found.report("skip"):
            tell(f"samples: {line}")
        items += found.items
    settings = StudySettings(
        title=config.title or path.stem,
        instructions=instructions,
        overlap=config.overlap,
        gold_every=config.gold_every,
        tags=tuple(config.tags or ()),
    )
    with Study.create(path, settings) as study:
        try:
            added, there = add_items(study, items)
        except BaseException:
            study.close()
            path.unlink(missing_ok=True)  # a study without items is useless
            raise
    if folder.exists():
        shutil.rmtree(folder)
    _tell_added(added, there)
    tell(f"{path}: ready; next: prefopt collect serve {path}")
    return 0


def collect_import(config: collect.CollectImportConfig) -> int:
    with Study(Path(config.study)) as study:
        _tell_added(*add_items(study, _gathered(config)))
    return 0


def _gathered(config: collect.ImportOptions) -> list[NewItem]:
    from prefopt.collect.import_items import gold_items, items_from_files

    items: list[NewItem] = []
    for what, names, gather in (("responses", config.responses, items_from_files), ("gold", config.gold, gold_items)):
        if names is not None:
            found = gather(names, config)
            for line in found.report(config.on_bad_row):
                tell(f"{what}: {line}")
            items += found.items
    return for_everyone(items, config.for_everyone)


def _tell_added(added: int, there: int) -> None:
    tell(f"{added:,} items added" + (f", {there:,} duplicates" if there else ""))


def _read_text(name: str) -> str:
    try:
        return Path(name).read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--instructions {name}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--instructions {name}: is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None


def collect_serve(config: collect.CollectServeConfig) -> int:
    with needing("collect", "prefopt collect serve"):
        from prefopt.collect.serve import serve
    serve(config)
    return 0


def collect_invite(config: collect.CollectInviteConfig) -> int:
    with Study(Path(config.study)) as study:
        if config.revoke:
            annotator = revoke(study, config.name)
            tell(f"{annotator.name} is signed out everywhere and has no link any more; the votes are kept")
            return 0
        annotator, secret = invite(study, config.name, lead=config.lead, days=config.days)
    tell(f"{annotator.name} ({annotator.pseudonym}{', lead' if annotator.lead else ''}), for {config.days:g} days:")
    served = address_of(Path(config.study))
    tell(f"{(config.url or served or NOT_SERVED).rstrip('/')}/join/{secret}")
    if config.url is None and served is None:
        tell("the study is not being served now; this is the default address of prefopt collect serve")
    return 0


def collect_stats(config: collect.CollectStatsConfig) -> int:
    with Study(Path(config.study)) as study:
        found = summarise(study)
    if config.json:
        tell_json(_plain(dataclasses.asdict(found)))
    else:
        tell_lines(_in_words(found))
    return 0


def _plain(value: Any) -> Any:
    """Replace nan, which JSON does not have, by null."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _in_words(s: StudySummary) -> list[str]:
    lines = [
        f"{s.title}: {s.votes:,} of {s.wanted:,} votes, {s.complete:,} of {s.items:,} items complete"
        f" ({s.gold_votes:,} more votes on {s.gold_items:,} gold items)"
    ]
    for name, counts in (("answers", s.answers), ("skipped", s.skips)):
        if counts:
            lines.append(f"{name}: " + ", ".join(f"{what} {count:,}" for what, count in sorted(counts.items())))
    if s.undone:
        lines.append(f"undone: {s.undone:,}")
    lines += [
        f"raw agreement {_number(s.raw)}; Cohen's kappa, mean over pairs of annotators {_number(s.kappa)}",
        f"Krippendorff's alpha: nominal {_estimate(s.nominal)}, ordinal {_estimate(s.ordinal)}",
        f"preferred what was shown first: {_estimate(s.first)} (0.5 without a bias)",
    ]
    for a in s.annotators:
        lines.append(
            f"  {a.name} ({a.pseudonym}): {a.votes:,} votes, {a.skips:,} skipped, median {_number(a.seconds, 1)} s;"
            f" agreement with others {_number(a.agreement)}, kappa with the majority {_number(a.kappa)},"
            f" shown first {_estimate(a.first)}, gold {_number(a.gold.value)} of {a.golds:,}"
        )
        lines += [f"    look at these votes: {flag} ({MEANING[flag]})" for flag in a.flags]
    lines += [f"  {m.name}: won {m.won:,}, tied {m.tied:,}, lost {m.lost:,}; {_estimate(m.share)}" for m in s.models]
    if s.disputed:
        lines.append("most disputed items: " + ", ".join(str(d.item) for d in s.disputed))
    return lines


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _estimate(e: Estimate) -> str:
    return _number(e.value) + ("" if math.isnan(e.low) else f" [{e.low:.3f}, {e.high:.3f}]")


def _export_votes(study: Study, config: collect.CollectExportConfig) -> int:
    rows = list(vote_rows(study, _pseudonyms(study, config.exclude or ())))
    if not rows:
        raise DataError("no vote is in force", file=str(study.path))
    outputs, endings = {"--output": config.output}, (*ENDINGS, ".csv")
    with row_files(outputs, overwrite=config.overwrite, inputs=[study.path], endings=endings) as (file,):
        for row in rows:
            file.write(row)
        file.finish()
        tell(f"{file.path}: {file.written:,} votes and skips")
    return 0


def collect_export(config: collect.CollectExportConfig) -> int:
    outputs = {"--output": config.output}
    if config.eval_output is not None:
        outputs["--eval-output"] = config.eval_output
    path = Path(config.study)
    with Study(path) as study:
        if config.form == "votes":
            return _export_votes(study, config)
        options = ExportOptions(
            form=config.form,
            disagreement=config.disagreement,
            ties=config.ties,
            all_bad=config.all_bad,
            min_votes=config.min_votes,
            exclude=_pseudonyms(study, config.exclude or ()),
        )
        found = export_rows(study, options)
    for line in found.lines():
        tell(line)
    if not found.rows:
        raise DataError(
            "the votes give no rows with these options; lower --min-votes, or change --disagreement, --ties or"
            " --all-bad",
            file=str(path),
        )
    # The keys of annotations and sampling settings differ from row to row.
    with row_files(outputs, overwrite=config.overwrite, inputs=[path], loose={"annotations", "sampling"}) as files:
        for row, side in zip(found.rows, _sides(found, config), strict=True):
            files[side].write(row)
        for file in files:
            file.finish()
            tell(f"{file.path}: {file.written:,} rows")
    return 0


def _sides(found: Exported, config: collect.CollectExportConfig) -> Sequence[int]:
    """For each row the file it goes to; all rows of a prompt go to one."""
    sides = np.zeros(len(found.rows), np.int8)
    if config.eval_fraction:
        keys = np.frombuffer(b"".join(found.prompt_keys), KEY)
        sides[np.asarray(split_by_prompt(keys, config.eval_fraction, config.seed)[1])] = 1
    return [int(side) for side in sides]


def _pseudonyms(study: Study, names: Sequence[str]) -> frozenset[str]:
    with study.reading() as connection:
        everyone = annotators(connection)
    known = {name: a.pseudonym for a in everyone for name in (a.name, a.pseudonym)}
    for name in names:
        if name not in known:
            there = ", ".join(a.name for a in everyone)
            raise ConfigError(f"--exclude {name!r}: there is no such annotator; there are {there}")
    return frozenset(known[name] for name in names)


def collect_backup(config: collect.CollectBackupConfig) -> int:
    written = backup(Path(config.study), Path(config.output))
    tell(f"{config.output}: {size(written)}")
    return 0


def collect_check(config: collect.CollectCheckConfig) -> int:
    path = Path(config.study)
    found = check_study_file(path)
    for line in found:
        tell(f"{path}: {line}")
    if found:
        tell(f"{len(found)} damaged; restore a copy made by prefopt collect backup")
    else:
        tell(f"{path}: no damage: every item and event is as it was written")
    return int(bool(found))
