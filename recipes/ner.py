"""Named-entity recognition: an encoder such as BERT (Devlin et al., 2019) tags each word, with any PEFT method.

python recipes/ner.py --config recipes/configs/minilm/ner.yaml --train_file train.conll --validation_file dev.conll \\
    --test_file test.conll --output_dir runs/ner
"""

from posttrain.errors import run_main


def main() -> None:
    from posttrain.training.stage import open_stage

    stage = open_stage("ner")

    # Data
    from posttrain.training import ner

    train, validation, test = ner.load(stage)
    labels = train.tag_list()

    # Tokenizer, and all that can be checked before weights are read
    from posttrain.config.sections import ModelSettings
    from posttrain.models.loading import check_base, load_tokenizer

    args = ner.trainer_args(stage, validation)
    settings = stage.config.part(ModelSettings)
    base = check_base(settings, None)
    tokenizer = load_tokenizer(base, settings, task="TOKEN_CLS")
    sets = {"train": train, "validation": validation, "test": test}
    encoded = ner.encode_all(stage, tokenizer, sets, base)

    # Model and adapter
    model = ner.start(stage, base, labels)

    # Trainer
    trainer = ner.make_trainer(model, args, tokenizer, encoded, sets, labels)

    # Train
    stage.announce(trainer)
    stage.train(trainer)

    # Save, measure, prove
    ner.finish(stage, trainer, tokenizer, base=base, labels=labels, encoded=encoded, sets=sets)


if __name__ == "__main__":
    run_main(main)
