"""The table of faults: what goes wrong, what happens then, and the test that shows it.


python -m tests.faults.table            writes docs/reliability.md; a test compares the two
"""

# ruff: noqa: E501 - a table of sentences

from pathlib import Path
from typing import NamedTuple

from tests.inputs import INPUTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
CLAIMED = 60  # what the page and the README may say
FLOWS, FAULTS, STORE = "tests/flows/", "tests/faults/", "tests/store/"
INTERRUPT, ENVIRONMENT = f"{FLOWS}test_interrupt.py::", f"{FLOWS}test_environment.py::"
KILLED = "the next run makes that stage's artifact and no other; all contents equal those of an undisturbed run"


class Row(NamedTuple):
    """A fault, what happens, and the test as `file::function`, with `[case]` where it has many."""

    fault: str
    happens: str
    test: str


def _killed(stage: str, words: str = "") -> Row:
    test = f"{FAULTS}test_faults.py::test_a_process_group_killed_in_a_stage_costs_that_stage[{stage}]"
    return Row(f"the process group is killed (kill -9) in `{stage}`{words}", KILLED, test)


TABLE: dict[str, list[Row]] = {
    "Processes that end": [
        *map(_killed, ("fetch", "target", "generate", "filter", "probe", "mix", "check", "train", "merge")),
        _killed("evaluate-probe", ", the last stage"),
        Row("killed while it samples, pre-empted and then stopped while it trains", "the run ends with the weights of an undisturbed one; finished shards stay, the training goes on at its last whole checkpoint", f"{INTERRUPT}test_one_run_killed_then_pre_empted_then_stopped_ends_with_the_same_weights"),
        Row("killed in the middle of sampling", "finished shards stay as they are; the draft is continued with the next one", f"{INTERRUPT}test_kill_9_costs_no_finished_work[generate]"),
        Row("killed in the middle of training", "the training goes on at its last whole checkpoint, to the same bits", f"{INTERRUPT}test_kill_9_costs_no_finished_work[train]"),
        Row("a training killed at ten random steps", "the same bits as of one training", "tests/train/test_train_interrupted.py::test_killed_at_ten_random_steps_the_bits_are_those_of_one_training"),
        Row("a training that was stopped early is killed while it saves", "it stays stopped where it was", "tests/train/test_train_interrupted.py::test_a_training_stopped_early_and_killed_while_saving_stays_stopped"),
        Row("a checkpoint half written", "it is dropped, and the one before is taken", "tests/train/test_train.py::test_half_written_checkpoints_are_dropped"),
        Row("one of several training processes is killed", "all end; the message names the one that was killed, not those that complain of it", "tests/process/test_process.py::test_a_killed_rank_is_named_and_not_its_peers_that_complain"),
        Row("one of several sampling processes is killed", "another takes its place and writes the same bytes", "tests/generate/test_shards.py::test_two_processes_write_the_same_bytes_and_a_killed_one_is_replaced"),
        Row("a Ray worker is killed in the middle of a shard", "the shard is sampled again elsewhere, to the same bytes", "tests/tasks/test_cluster.py::test_a_killed_worker_costs_its_shard_and_no_byte"),
        Row("Ctrl-C, or SIGTERM before a pre-emption", "children save and end, exit code 130, the last line is the command that continues", f"{INTERRUPT}test_ctrl_c_and_pre_emption_end_children_and_say_how_to_continue"),
        Row("the command alone is killed: its training", "ends with it, so that nothing computes unseen", "tests/process/test_process.py::test_the_child_ends_with_its_parent"),
        Row("the command alone is killed: its temporary Prefect server", "ends with it", f"{INTERRUPT}test_a_temporary_server_ends_with_its_command"),
        Row("the memory is full", "one message that names the settings that would help, with their present values", "tests/process/test_process.py::test_out_of_memory_names_what_would_help_with_its_present_value"),
        Row("a sampling batch does not fit into memory", "it is halved until it fits, and the shard says so", "tests/generate/test_shards.py::test_a_batch_that_does_not_fit_is_halved_and_the_shard_says_so"),
        Row("the loss is NaN or infinite", "the training ends with a remedy; it is not tried again", "tests/train/test_train.py::test_a_loss_that_is_not_finite_ends_the_training_with_a_remedy"),
        Row("weights are NaN after the last update", "they are never saved as a success", "tests/train/test_train.py::test_weights_that_are_not_finite_are_never_saved"),
        Row("nobody reads the output any more", "one message and exit code 141", f"{ENVIRONMENT}test_an_output_that_nobody_reads_ends_with_one_message"),
    ],
    "Several at once": [
        Row("two identical runs at once", "the second waits, says so, and finds what the first made; everything is made once", f"{FAULTS}test_faults.py::test_two_identical_runs_at_once_make_everything_once"),
        Row("the lock of a dead process", "the kernel has freed it: nobody waits", f"{ENVIRONMENT}test_a_process_that_dies_frees_its_lock"),
        Row("a stage is killed while it holds the lock of a key", "the next one takes the lock and continues the draft", f"{STORE}test_artifact.py::test_kill_9_frees_the_lock_and_the_draft_is_continued"),
        Row("an orphan still writes into a draft", "its successor waits for it", "tests/process/test_process.py::test_two_children_never_write_one_draft_at_a_time"),
        Row("two data folders make one key at once for a shared store", "the first one's artifact stays", f"{STORE}test_shared_store.py::test_of_two_that_make_one_key_at_once_the_first_wins"),
    ],
    "Servers": [
        Row("the worker is killed in the middle of a training", "its flow run's children end and the draft stays; with a new worker the recipe goes on at the last checkpoint", f"{FAULTS}test_servers.py::test_a_worker_that_is_killed_loses_nothing"),
        Row("a run is cancelled in the Prefect UI", "its children end, its draft stays, and the next run continues it", f"{FAULTS}test_servers.py::test_a_cancelled_run_ends_its_children_and_keeps_its_draft"),
        Row("the Prefect server is killed in the middle of a run and comes back", "the next run completes; nothing that was finished is made again", f"{FAULTS}test_servers.py::test_a_prefect_server_that_is_killed_and_comes_back_loses_nothing"),
        Row("a command that holds the GPU is killed, and its temporary Prefect server with it", "its slot is free again when its lease has run out, five minutes at most", f"{FAULTS}test_servers.py::test_a_killed_command_gives_its_gpu_slot_back"),
        Row("the Prefect server is away at the start", "one message with its address and what to do, exit code 2", f"{ENVIRONMENT}test_a_server_that_is_away_is_named"),
        Row("the Prefect server accepts connections and never answers", "the same, after eight seconds", f"{ENVIRONMENT}test_a_server_that_never_answers_is_not_waited_for"),
        Row("something else answers at Prefect's address; a login is wanted; another version", "a message for each", f"{ENVIRONMENT}test_what_is_no_server_of_ours_is_refused"),
        Row("a server of ours does not start", "the message shows how it ended and the last lines that it wrote", f"{ENVIRONMENT}test_a_server_that_does_not_start_shows_why"),
        Row("a port is taken", "a line says by whom, and the next one is used", f"{ENVIRONMENT}test_a_port_in_use_is_named_with_who_uses_it"),
        Row("somebody on the network looks for the servers of `make up`", "they listen on 127.0.0.1 alone", f"{FLOWS}test_serve.py::test_all_that_make_up_starts_listens_on_loopback_alone"),
        Row("the database of the Prefect server is away", "one message without its password", f"{ENVIRONMENT}test_a_database_that_is_away_is_named"),
        Row("the list of servers in the data folder is damaged", "it counts as no list", f"{ENVIRONMENT}test_a_broken_list_of_servers_is_no_list"),
        Row("MLflow is down from the start", "said once; the run completes, and the next one fills MLflow in from the artifacts", f"{FAULTS}test_servers.py::test_an_mlflow_that_is_down_is_filled_by_the_next_run[start]"),
        Row("MLflow goes down in the middle", "the same", f"{FAULTS}test_servers.py::test_an_mlflow_that_is_down_is_filled_by_the_next_run[middle]"),
        Row("MLflow goes down at the end", "the same; what it had as RUNNING is ended by the next run", f"{FAULTS}test_servers.py::test_an_mlflow_that_is_down_is_filled_by_the_next_run[end]"),
        Row("MLflow accepts connections and never answers", "it is given eight seconds", "tests/tasks/test_record.py::test_an_mlflow_that_never_answers_is_not_waited_for"),
        Row("MLflow lost its database", "a cached run is replayed into the new one", "tests/tasks/test_record.py::test_a_cached_run_is_replayed_into_a_server_that_never_saw_it"),
        Row("MLflow shows runs of a killed process as RUNNING", "the next run ends them as KILLED", "tests/tasks/test_record.py::test_runs_of_a_killed_process_are_ended_by_the_next"),
        Row("Prefect remembers an artifact that the store has lost", "it is made again", f"{FLOWS}test_flows.py::test_what_prefect_remembers_but_the_store_lost_is_made_again"),
        Row("the completions server dies in the middle of sampling", "unfinished shards are sampled again by its successor, finished ones stay", "tests/generate/test_shards.py::test_a_server_fills_the_same_table_and_one_that_dies_costs_unfinished_shards_only"),
        Row("the completions server fails now and then", "requests are tried again; the rows are the same", "tests/generate/test_server.py::test_failures_that_pass_are_tried_again_and_leave_no_trace"),
        Row("the completions server serves other weights", "it is refused before a row is sampled", "tests/generate/test_server.py::test_the_start_check_refuses_other_weights"),
        Row("the model hub does not answer", "one message in time", "tests/model/test_hub.py::test_a_hub_that_does_not_answer_ends_in_one_message_in_time"),
        Row("a download from the hub was cut short", "it is found before anything runs", "tests/model/test_hub.py::test_a_broken_download_is_found_in_the_plan_of_what_is_cached"),
    ],
    "Disks and the store": [
        Row("an artifact is truncated, another has one byte changed, a third is deleted", "each is named and made again, and no other; contents are as before", f"{FAULTS}test_faults.py::test_damaged_artifacts_are_made_again_and_no_others"),
        Row("a manifest is damaged in any way", "the artifact counts as absent", f"{STORE}test_damaged_artifacts.py::test_fields_of_a_manifest_changed_or_dropped"),
        Row("files swapped, links that lead nowhere, a file in place of the folder", "what is damaged is named, and made again", f"{STORE}test_damaged_artifacts.py::test_damage_is_named_and_mended"),
        Row("bits change on the disk under an unchanged date", "`verify` reads every byte and names the file", f"{STORE}test_artifact.py::test_verify_reads_every_byte_and_names_file_and_remedy"),
        Row("the cache of file digests is damaged", "files are read again", f"{STORE}test_damaged_artifacts.py::test_a_broken_memory_of_digests_is_not_believed"),
        Row("a draft was begun with other package versions or settings of the machine", "it starts anew and says so", f"{STORE}test_artifact.py::test_a_draft_of_another_environment_starts_anew_and_says_so"),
        Row("the mark of a draft is damaged", "it starts anew", f"{STORE}test_damaged_artifacts.py::test_a_draft_with_a_broken_mark_starts_anew"),
        Row("the disk fills up in a short stage (`mix`)", "one message, exit code 2; with room again, the next run makes that stage alone", f"{FAULTS}test_faults.py::test_a_disk_that_fills_up_in_a_stage_is_named_and_costs_that_stage[mix]"),
        Row("the disk fills up in a training", "the same", f"{FAULTS}test_faults.py::test_a_disk_that_fills_up_in_a_stage_is_named_and_costs_that_stage[train]"),
        Row("the disk fills up at the very end of a training", "no work is lost: the draft is whole", f"{STORE}test_artifact.py::test_a_full_disk_at_the_very_end_loses_no_work"),
        Row("not even the error of a process can be written", "it is still told as a full disk", "tests/process/test_process.py::test_a_child_that_could_not_write_its_error_met_a_full_disk"),
        Row("the store is mounted read-only", "one message that names the place, exit code 2; nothing changes", f"{FAULTS}test_faults.py::test_a_store_that_cannot_be_written_is_named_and_stays_as_it_is"),
        Row("a filesystem without locks, without links, read-only, without rights", "one message before anything runs", f"{ENVIRONMENT}test_a_disk_that_lacks_what_is_needed_is_named"),
        Row("the data folder was moved", "nothing runs again", f"{FLOWS}test_flows.py::test_a_moved_data_folder_runs_nothing_again"),
        Row("object storage goes away in the middle of a push", "the run completes and says so; the next one ends the push", f"{STORE}test_shared_store.py::test_a_server_killed_in_the_middle_of_a_push_costs_nothing"),
        Row("a push is killed", "others see nothing of it; the next run ends it", f"{STORE}test_shared_store.py::test_a_push_that_is_killed_shows_nothing_and_the_next_run_ends_it"),
        Row("an artifact in the shared store has a byte changed", "it is refused when it is read, and repaired by the next run", f"{STORE}test_shared_store.py::test_a_changed_byte_is_refused_when_it_is_read_and_mended_by_the_next_run"),
        Row("a clock that is ten years back and another PYTHONHASHSEED", "the same keys, the same contents; with the right clock nothing runs again", f"{FAULTS}test_faults.py::test_another_clock_and_another_hash_seed_change_no_key_and_no_content"),
        Row("no HOME, no temporary folder with room", "folders below the data folder take their place", f"{ENVIRONMENT}test_a_temporary_folder_without_room_is_replaced"),
    ],
    "Recipes, data and models from elsewhere": [
        Row("a benchmark's template that reaches for Python", "it is refused in a sandbox, in plans too", f"{FAULTS}test_untrusted.py::test_a_template_of_a_benchmark_reaches_nothing_but_its_document"),
        Row("a chat template that reaches for Python", "it is refused in a sandbox", f"{FAULTS}test_untrusted.py::test_a_chat_template_reaches_nothing_but_its_messages"),
        Row("YAML with a tag that makes an object", "it is no valid YAML", f"{FAULTS}test_untrusted.py::test_a_tag_in_yaml_makes_no_object"),
        Row("names such as `../../outside` or `/tmp/outside` of recipes and variants", "no file is written outside of the report's folder", f"{FAULTS}test_untrusted.py::test_no_name_leads_out_of_the_data_folder"),
        Row("a name with characters that move a terminal's cursor", "the recipe is refused", f"{FAULTS}test_untrusted.py::test_a_name_that_a_terminal_would_obey_is_refused"),
        Row("a benchmark named by a path", "there is no such benchmark", f"{FAULTS}test_untrusted.py::test_a_benchmark_is_looked_for_by_name_and_never_by_path"),
        Row("a manifest in a shared store that names a file elsewhere", "it is refused", f"{STORE}test_shared_store.py::test_a_manifest_cannot_write_elsewhere"),
        Row("scripts, images and links in rows, answers and names", "a browser shows them and neither runs nor loads anything", f"{FAULTS}test_untrusted.py::test_a_browser_shows_what_people_and_models_wrote_and_runs_none_of_it"),
        Row("the same in a model card and in texts for Prefect and MLflow", "Markdown shows them and makes no link, image or HTML of them", f"{FAULTS}test_untrusted.py::test_a_model_card_shows_names_and_does_not_obey_them"),
        Row("secrets in the environment and in addresses, in runs that fail", "they are in no file of the data folder and of the servers, and in no output", f"{FAULTS}test_secrets.py::test_no_secret_is_written_anywhere"),
    ],
}  # fmt: skip
INTRODUCTION = """# What can fail, and what happens then

The test beside each fault below really causes it: processes are killed, servers ended, files cut, disks filled. Two
things hold for all of them: what is finished stays as it is, and the same command again completes, without making
anything twice.

{faults} faults and {inputs} bad inputs. `python -m tests.faults.table` writes this page, and a test compares the two and looks
for every test that it names. Those that take longer, or need root for a mount, are marked `slow`:
`python -m pytest -m slow tests/faults`.
"""
BAD_INPUT = """
## Bad inputs

Each is brought to the command line as a user would; what each message says is in [what is refused](reference/refusals.md).
The test of all: `tests/flows/test_inputs.py::test_an_input_ends_as_the_page_says`.
"""
LIMITS = """
## What is not covered

* Bits that change on a disk under an unchanged size and date are found by `cfsd store verify`, not by every run.
* Locks are the kernel's, so a data folder on a network disk needs one whose locks work between machines; the start of
  every command tries a lock, but only on its own machine.
* No training over several machines was killed: there is one machine to test on.
"""


def page() -> str:
    """Return the page of docs."""
    refused = [(title, brought.what) for title, inputs in INPUTS.items() for brought in inputs if brought.refused]
    lines = [INTRODUCTION.format(faults=sum(map(len, TABLE.values())), inputs=len(refused))]
    for title, rows in TABLE.items():
        lines += [f"\n## {title}\n\n| fault | what happens | test |\n|---|---|---|"]
        lines += [f"| {row.fault} | {row.happens} | `{row.test}` |" for row in rows]
    lines += [BAD_INPUT, "| of | bad input |\n|---|---|", *(f"| {title} | {what} |" for title, what in refused)]
    return "\n".join([*lines, LIMITS])


if __name__ == "__main__":
    PAGE.write_text(page())
